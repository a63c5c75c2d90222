"""The one file of weights that the graphs of a bundle share: each content lies in it once.

With float16 storage the weights are rounded first (not the routers'), and every tensor that float16 holds without loss is stored as
such with a Cast to float32 behind it, which a runtime folds when it loads; but for the scales of integers, which must be constants.
"""

import hashlib
from copy import deepcopy
from typing import BinaryIO

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from mose_ros.modeling.driver import MoseDriver
from mose_ros.training.folding import sink
from mose_ros.training.graphs import subgraphs

WEIGHTS = 'weights.bin'
ALIGNMENT = 64  # bytes; of each tensor in weights.bin
INLINE = 64  # numbers; smaller tensors stay in their graph


class Weights:
    """weights.bin while it is written: each content once."""

    def __init__(self, file: BinaryIO, halve: bool):
        self._file, self._halve = file, halve
        self._places: dict[str, tuple[int, int]] = {}

    def take(self, model: onnx.ModelProto) -> None:
        """Move the larger weights of a model, also those inside its conditions, into the file."""
        graphs = list(subgraphs(model.graph))
        scales = {
            name
            for graph in graphs
            for node in graph.node
            if node.op_type in ('QuantizeLinear', 'DequantizeLinear')
            for name in node.input[1:]
        }
        for graph in reversed(graphs):  # inner ones first: an outer one copies them
            casts = []
            for tensor in graph.initializer:
                if np.prod(tensor.dims) < INLINE:
                    continue
                name, stored = tensor.name, tensor
                if self._halve and name not in scales and _fits_half(tensor):
                    name = f'{tensor.name}.float16'
                    array = numpy_helper.to_array(tensor).astype(np.float16)
                    stored = numpy_helper.from_array(array)
                    casts.append(
                        helper.make_node('Cast', [name], [tensor.name], to=onnx.TensorProto.FLOAT)
                    )
                self._refer(tensor, name, stored)
            nodes = list(graph.node)
            del graph.node[:]
            graph.node.extend([*casts, *nodes])
        sink(model.graph)

    def _refer(self, tensor: onnx.TensorProto, name: str, stored: onnx.TensorProto) -> None:
        data = stored.raw_data or numpy_helper.from_array(numpy_helper.to_array(stored)).raw_data
        key = hashlib.sha256(data).hexdigest()
        if key not in self._places:
            self._file.write(b'\0' * (-self._file.tell() % ALIGNMENT))
            self._places[key] = (self._file.tell(), len(data))
            self._file.write(data)
        offset, length = self._places[key]
        tensor.CopyFrom(
            onnx.TensorProto(
                name=name,
                dims=stored.dims,
                data_type=stored.data_type,
                data_location=onnx.TensorProto.EXTERNAL,
            )
        )
        for field, value in (('location', WEIGHTS), ('offset', offset), ('length', length)):
            tensor.external_data.add(key=field, value=str(value))


def _fits_half(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type != onnx.TensorProto.FLOAT:
        return False
    array = numpy_helper.to_array(tensor)
    with np.errstate(over='ignore'):
        return bool((array.astype(np.float16).astype(np.float32) == array).all())


def rounded(driver: MoseDriver) -> MoseDriver:
    """Return a copy whose weights are numbers of float16; routers keep theirs, where ties decide."""
    driver = deepcopy(driver)
    with torch.no_grad():
        for name, weight in driver.named_parameters():
            if 'router' not in name:
                weight.copy_(weight.half())
                if not weight.isfinite().all():
                    raise ValueError(f'{name} is too large for float16; export with float32')
    return driver

"""What of a graph depends on its weights alone, computed once and for all at the export: weights joined, turned round, tables of angles."""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

GROWTH = 1 << 20  # bytes that a folded tensor may be larger than what it is made of


def fold(model: onnx.ModelProto) -> None:
    """Replace the nodes of a model that read nothing but constants by what they say; conditions are left as they are."""
    graph = model.graph
    known = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    kept, made = [], {}
    for node in graph.node:
        inputs = {name: known[name] for name in node.input if name in known}
        whole = len(inputs) == len(set(node.input) - {''})
        is_plain = not any(one.type == onnx.AttributeProto.GRAPH for one in node.attribute)
        if not (whole and is_plain):
            kept.append(node)
            continue
        answers = _compute(model, node, inputs)
        if sum(one.nbytes for one in answers) > GROWTH + sum(
            one.nbytes for one in inputs.values()
        ):
            kept.append(node)
            continue
        made.update(zip(node.output, answers, strict=True))
        known.update(made)
    used = set(_names(kept)) | {one.name for one in graph.output}
    old = [one for one in graph.initializer if one.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(old)
    infos = [one for one in graph.value_info if one.name not in made]
    for name, value in made.items():
        if name in used:
            graph.initializer.append(numpy_helper.from_array(value, name))
            kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            infos.append(onnx.helper.make_tensor_value_info(name, kind, value.shape))
    del graph.value_info[:]
    graph.value_info.extend(infos)


def _compute(
    model: onnx.ModelProto, node: onnx.NodeProto, inputs: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Return what one node answers."""
    ends = [
        [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in pairs]
        for pairs in (
            [(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype)) for n, a in inputs.items()],
            [(n, onnx.TensorProto.UNDEFINED) for n in node.output],
        )
    ]
    alone = onnx.helper.make_graph([node], 'alone', *ends)
    made = onnx.helper.make_model(
        alone, opset_imports=model.opset_import, ir_version=model.ir_version
    )
    return [np.ascontiguousarray(one) for one in ReferenceEvaluator(made).run(None, dict(inputs))]


def _names(nodes) -> Iterator[str]:
    """Yield all names that nodes read, those inside their conditions too."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _names(attribute.g.node)
                yield from (one.name for one in attribute.g.output)

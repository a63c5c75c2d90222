"""Reads an ONNX graph: what makes a tensor, how large it is, which weights it takes; and takes parts of it as graphs."""

import ast
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from mose_ros.engine.session import Port

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


class Uncut(ValueError):
    """A graph that cannot be cut; the message says why. It runs as it is."""


class OnnxGraph:
    """An ONNX graph, asked by the names of its tensors. Its weights stay in their files until they are asked for."""

    def __init__(self, path: str | Path):
        path = Path(path)
        self._model, self._folder = onnx.load(path, load_external_data=False), path.parent
        graph = self._model.graph
        self.name: str = graph.name
        self.nodes: Sequence[NodeProto] = graph.node
        self.inputs: Sequence[ValueInfoProto] = graph.input
        self.outputs: Sequence[ValueInfoProto] = graph.output
        self.weights: Mapping[str, TensorProto] = {one.name: one for one in graph.initializer}
        self.makers: Mapping[str, NodeProto] = {
            name: node for node in graph.node for name in node.output
        }
        values = [*graph.value_info, *graph.input, *graph.output]
        self._infos = {one.name: one for one in values}
        self._constant: dict[str, bool] = {}

    def info(self, name: str) -> ValueInfoProto:
        """Return the type and sizes of a tensor; Uncut where the file does not say."""
        if name not in self._infos:
            raise Uncut(f'the file does not say what {name} is')
        return self._infos[name]

    def count(self, name: str) -> int:
        """Return how many values a tensor has, 0 where that is open."""
        sizes = sizes_of(self._infos[name]) if name in self._infos else (0,)
        return 0 if any(isinstance(one, str) for one in sizes) else int(np.prod(sizes))

    def is_constant(self, name: str) -> bool:
        """Return whether a tensor depends on weights alone."""
        if name not in self._constant:
            node = self.makers.get(name)
            self._constant[name] = (
                name in self.weights or not name
                if node is None
                else all(self.is_constant(one) for one in reads(node))
            )
        return self._constant[name]

    def first_alike(self, name: str) -> str:
        """Return the first tensor that is made as this one is: layers read the number of their level each for themselves."""
        if name not in self.makers:
            return name
        asked = self._way(name)
        return next(other for other in self.makers if self._way(other) == asked)

    def _way(self, name: str) -> tuple:
        """Return what a tensor is made of, the same for two that are always equal."""
        node = self.makers[name]
        inputs = tuple(
            self.array(self.weights[one]).tobytes()
            if one in self.weights and np.prod(self.weights[one].dims, dtype=np.int64) < 16
            else one
            for one in node.input
        )
        attributes = tuple(one.SerializeToString() for one in node.attribute)
        return node.op_type, list(node.output).index(name), inputs, attributes

    def array(self, weight: TensorProto) -> np.ndarray:
        """Read a weight."""
        return numpy_helper.to_array(weight, str(self._folder))

    def behind(self, names: Sequence[str]) -> list[NodeProto]:
        """Return all nodes that some tensors depend on, in the graph's order."""
        found: dict[int, NodeProto] = {}
        todo = list(names)
        while todo:
            node = self.makers.get(todo.pop())
            if node is not None and id(node) not in found:
                found[id(node)] = node
                todo += reads(node)
        return [node for node in self.nodes if id(node) in found]

    def part(
        self,
        name: str,
        nodes: Sequence[NodeProto],
        inputs: Sequence[ValueInfoProto],
        outputs: Sequence[ValueInfoProto],
    ) -> ModelProto:
        """Return nodes as a model, which refers to the same files of weights."""
        used = dict.fromkeys(one for node in nodes for one in reads(node))
        weights = [self.weights[one] for one in used if one in self.weights]
        return onnx.helper.make_model(
            onnx.helper.make_graph(nodes, name, inputs, outputs, weights),
            opset_imports=self._model.opset_import,
            ir_version=self._model.ir_version,
        )


def reads(node: NodeProto) -> Iterator[str]:
    """Yield what a node reads, within its subgraphs too."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            inner = attribute.g
            own = {name for one in inner.node for name in one.output}
            own |= {one.name for one in (*inner.initializer, *inner.input)}
            yield from (name for one in inner.node for name in reads(one) if name not in own)


def in_order(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Return nodes in an order in which each comes behind what it reads."""
    made = {name: node for node in nodes for name in node.output}
    done: dict[int, NodeProto] = {}

    def visit(node):
        if id(node) not in done:
            for name in node.input:
                if name in made:
                    visit(made[name])
            done[id(node)] = node

    for node in nodes:
        visit(node)
    return list(done.values())


def port_of(info: ValueInfoProto) -> Port:
    """Return the type and sizes of an input or output as sessions name them."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
    return Port(kind, tuple(one if isinstance(one, int) else None for one in sizes_of(info)))


def sizes_of(info: ValueInfoProto) -> tuple[int | str, ...]:
    """Return the sizes of a tensor: numbers, or the names and terms of open ones."""
    return tuple(
        one.dim_value if one.HasField('dim_value') else one.dim_param
        for one in info.type.tensor_type.shape.dim
    )


def size_of(size: int | str, known: Mapping[str, int]) -> int:
    """Return a size that is written as a sum or product of known ones, as `3*tokens`; Uncut for anything else."""
    if isinstance(size, int):
        return size
    try:
        return _value(ast.parse(size, mode='eval').body, known)
    except (SyntaxError, KeyError, TypeError):
        raise Uncut(f'nobody knows the size {size!r}') from None


def _value(node: ast.expr, known: Mapping[str, int]) -> int:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left, known), _value(node.right, known))
    return known[node.id] if isinstance(node, ast.Name) else _whole(node)


def _whole(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    raise TypeError(f'{ast.dump(node)} is no size')

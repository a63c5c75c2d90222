"""Reads the experts out of a graph: an `If` tree becomes one expert whose weights are inputs.

    If(skill) { expert 0 | expert 1 | ... }   ->   expert, with the weights of whichever `skill` names

The branches must compute the same with other weights, and the tree must depend on one number alone, each value of which
leads to an expert of its own. Both are proven of the graph, by comparing nodes and by reckoning with each number, else Uncut.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto
from onnx.reference import ReferenceEvaluator

from mose_ros.engine.onnx_graph import OnnxGraph, Uncut, in_order, port_of, sizes_of

# what a condition may do with the number
INDEX = ('Less', 'Greater', 'Equal', 'Gather', 'Squeeze', 'Reshape', 'Cast', 'Sub', 'Add', 'Not')
FIXED = ('DequantizeLinear', 'QuantizeLinear')  # their weights must be constants for TensorRT
INTEGERS = (TensorProto.INT32, TensorProto.INT64)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """An `If` tree, written as one expert whose weights are inputs."""

    nodes: Sequence[NodeProto]
    decision: str  # the tensor with the number of the expert
    weights: Mapping[str, Sequence[np.ndarray]]  # by input: of each expert
    reads: frozenset[str]  # other tensors of the graph


def find_experts(graph: OnnxGraph) -> dict[str, Experts]:
    """Return the experts of a graph by the tensor that they make; Uncut where a condition is about anything else."""
    finder = _Finder(graph)
    return {node.output[0]: finder.experts(node) for node in graph.nodes if node.op_type == 'If'}


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    """What one expert computes."""

    nodes: Sequence[NodeProto]
    output: str
    weights: Mapping[str, TensorProto]  # that its branches hold


@dataclass(frozen=True, kw_only=True)
class _Tree:
    """The conditions of an `If` and what lies behind them."""

    leaves: Sequence[_Leaf]
    root: tuple  # a condition and its two ways, each again such a tuple or the place of a leaf
    arithmetic: Sequence[NodeProto]  # that branches do with the number
    constants: Mapping[
        str, TensorProto
    ]  # that they compare it with, where they hold these themselves


class _Finder:
    def __init__(self, graph: OnnxGraph):
        self._graph = graph

    def experts(self, node: NodeProto) -> Experts:
        """Read one tree."""
        tree, decision = _tree(node), self._decision(node)
        order = self._order(node, tree, decision)
        if sorted(order) != list(range(len(tree.leaves))):
            raise Uncut(f'{node.name}: not each number has an expert of its own')
        return self._join(node, [tree.leaves[index] for index in order], decision)

    def _decision(self, node: NodeProto) -> str:
        """Return the single number that the condition is about."""
        graph, name = self._graph, node.input[0]
        while (maker := graph.makers.get(name)) is not None and maker.op_type in INDEX:
            sources = [one for one in maker.input if not graph.is_constant(one)]
            if len(sources) != 1 or graph.count(sources[0]) != 1:
                break
            name = sources[0]
        if graph.count(name) != 1 or graph.info(name).type.tensor_type.elem_type not in INTEGERS:
            raise Uncut(f'{node.name}: its condition is about no number')
        return graph.first_alike(name)

    def _order(self, node: NodeProto, tree: _Tree, decision: str) -> list[int]:
        """Return the leaf that each number leads to, by reckoning with it as the graph does."""
        graph = self._graph
        nodes, asked = list(tree.arithmetic), [name for name, *_ in _conditions(tree.root)]
        have = {name for one in nodes for name in one.output} | tree.constants.keys() | {decision}
        todo = [*asked, *(name for one in nodes for name in one.input)]
        while todo:
            name = todo.pop()
            if name in have or name in graph.weights or not name:
                continue
            if name not in graph.makers:
                raise Uncut(f'{node.name}: its choice depends on {name}')
            have.update(graph.makers[name].output)
            is_alike = graph.first_alike(name) == decision
            nodes.append(
                onnx.helper.make_node('Identity', [decision], [name])
                if is_alike
                else graph.makers[name]
            )
            todo += nodes[-1].input
        outputs = [onnx.ValueInfoProto(name=name) for name in asked]
        info = graph.info(decision)
        part = graph.part('order', in_order(nodes), [info], outputs)
        part.graph.initializer.extend(tree.constants.values())
        reckon = ReferenceEvaluator(part)
        found = []
        for number in range(len(tree.leaves)):
            given = np.full(sizes_of(info), number, port_of(info).dtype)
            taken = dict(zip(asked, reckon.run(asked, {decision: given}), strict=True))
            place = tree.root
            while isinstance(place, tuple):
                place = place[1] if bool(np.all(taken[place[0]])) else place[2]
            found.append(place)
        return found

    def _join(self, node: NodeProto, leaves: Sequence[_Leaf], decision: str) -> Experts:
        """Return one expert that takes as inputs what differs between the leaves."""
        first = leaves[0]
        for leaf in leaves[1:]:
            self._compare(node, first, leaf)
        values = self._values(node, leaves)
        nodes, renamed = [], {first.output: node.output[0]}
        for one in first.nodes:
            if one.op_type == 'Cast' and one.input[0] in values:  # once, not at each run
                [to] = [a.i for a in one.attribute if a.name == 'to']
                kind = onnx.helper.tensor_dtype_to_np_dtype(to)
                values[one.output[0]] = [v.astype(kind) for v in values.pop(one.input[0])]
                continue
            copy = NodeProto()
            copy.CopyFrom(one)
            copy.ClearField('output')
            copy.output.extend(renamed.get(name, name) for name in one.output)
            nodes.append(copy)
        made = {name for one in nodes for name in one.output}
        reads = {name for one in nodes for name in one.input if name}
        names = {name: f'{node.output[0]}.{index}' for index, name in enumerate(values)}
        for one in nodes:
            inputs = [names.get(name, name) for name in one.input]
            one.ClearField('input')
            one.input.extend(inputs)
        return Experts(
            nodes=nodes,
            decision=decision,
            weights={names[name]: own for name, own in values.items()},
            reads=frozenset(reads - made - values.keys()),
        )

    def _values(self, node: NodeProto, leaves: Sequence[_Leaf]) -> dict[str, list[np.ndarray]]:
        """Return the weights that differ, by their name in the first leaf: the value in each leaf."""
        roles: dict[str, list[TensorProto]] = {}
        for place, one in enumerate(leaves[0].nodes):
            if one.op_type in FIXED:
                raise Uncut(f'{node.name}: weights of integers are constants')
            for slot, name in enumerate(one.input):
                own = [self._weight(leaf, leaf.nodes[place].input[slot]) for leaf in leaves]
                if own[0] is not None and any(weight is not own[0] for weight in own):
                    roles.setdefault(name, own)
        return {name: [self._graph.array(one) for one in own] for name, own in roles.items()}

    def _compare(self, node: NodeProto, one: _Leaf, other: _Leaf) -> None:
        """Raise Uncut where two experts differ in more than their weights."""
        same, alike = {one.output: other.output}, len(one.nodes) == len(other.nodes)
        for a, b in zip(one.nodes, other.nodes, strict=False):
            alike &= a.op_type == b.op_type and len(a.input) == len(b.input)
            alike &= [x.SerializeToString() for x in a.attribute] == [
                x.SerializeToString() for x in b.attribute
            ]
            for x, y in zip(a.input, b.input, strict=False):
                weights = self._weight(one, x), self._weight(other, y)
                if None in weights:
                    alike &= weights == (None, None) and same.get(x, x) == y
                else:
                    alike &= list(weights[0].dims) == list(weights[1].dims)
                    alike &= weights[0].data_type == weights[1].data_type
            same.update(zip(a.output, b.output, strict=False))
        if not alike or same[one.output] != other.output:
            raise Uncut(f'{node.name}: its experts differ in more than their weights')

    def _weight(self, leaf: _Leaf, name: str) -> TensorProto | None:
        return leaf.weights.get(name) or self._graph.weights.get(name)


def _tree(node: NodeProto) -> _Tree:
    leaves: list[_Leaf] = []
    arithmetic: list[NodeProto] = []
    constants: dict[str, TensorProto] = {}

    def walk(one: NodeProto, weights):
        branches = {a.name: a.g for a in one.attribute if a.type == AttributeProto.GRAPH}
        ways = []
        for branch in (branches['then_branch'], branches['else_branch']):
            own = {**weights, **{w.name: w for w in branch.initializer}}
            inner = [n for n in branch.node if n.op_type == 'If']
            if not inner:
                ways.append(len(leaves))
                output = branch.output[0].name
                leaves.append(_Leaf(nodes=branch.node, output=output, weights=own))
                continue
            rest = [n for n in branch.node if n.op_type != 'If']
            if len(inner) > 1 or any(n.op_type not in (*INDEX, 'Constant') for n in rest):
                raise Uncut(f'{one.name}: a branch does more than choose')
            arithmetic.extend(rest)
            read = {name for n in rest for name in n.input}
            for held in (w for w in branch.initializer if w.name in read):
                if constants.setdefault(held.name, held) != held:
                    raise Uncut(f'{one.name}: its branches mean two things by {held.name}')
            ways.append(walk(inner[0], own))
        return one.input[0], *ways

    root = walk(node, {})
    return _Tree(leaves=leaves, root=root, arithmetic=arithmetic, constants=constants)


def _conditions(tree) -> Iterator[tuple]:
    if isinstance(tree, tuple):
        yield tree
        for way in tree[1:]:
            yield from _conditions(way)

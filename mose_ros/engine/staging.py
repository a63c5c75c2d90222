"""Cuts a graph at the decisions inside it, so that the weights of an expert are inputs and no condition is left.

    whole:   see -> route -> If(skill) { expert 0 | expert 1 | ... } -> go on
    stages:  see -> route  |  go on, with the weights of one expert as inputs

Whoever runs the stages reads the decision between them and hands over the weights of the expert that it names: on a GPU that
is another address. What is left can be recorded as a CUDA graph, which a condition can't. Stages keep the names of the graph's
tensors and its operators, and refer to the same files of weights, so each is a graph like any other.
"""

import ast
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from mose_ros.engine.session import Port

HOST = -1  # the stage of what follows from the graph's inputs alone
FIXED = ('DequantizeLinear', 'QuantizeLinear')  # their weights must be constants for TensorRT
_INDEX = ('Less', 'Greater', 'Equal', 'Gather', 'Squeeze', 'Reshape', 'Cast', 'Sub', 'Add', 'Not')
# of numbers that come with the inputs: too little to pass from stage to stage
_SMALL = (*_INDEX, 'Constant', 'Unsqueeze', 'Split', 'Slice', 'GreaterOrEqual', 'Max', 'Clip')
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


class Uncut(ValueError):
    """A graph that cannot be cut; the message says why. It runs as it is."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A weight of some experts, as an input of a stage."""

    decision: str  # the tensor with the number of the expert
    values: Sequence[np.ndarray]  # of each expert


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a graph that is run at once."""

    model: ModelProto
    inputs: Mapping[str, Port]
    sizes: Mapping[
        str, tuple[int | str, ...]
    ]  # of the inputs: numbers, or sums and products of the graph's open sizes
    outputs: Sequence[str]
    choices: Mapping[str, Choice]  # by the inputs that are weights


@dataclass(frozen=True, kw_only=True)
class Staging:
    """A graph in stages, in the order in which they run."""

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    sizes: Mapping[str, tuple[int | str, ...]]  # of the inputs
    stages: Sequence[Stage]
    known: ModelProto | None  # computes the decisions that follow from the inputs alone

    def decide(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the decisions that follow from the inputs alone."""
        if self.known is None:
            return {}
        names = [one.name for one in self.known.graph.output]
        asked = {one.name: inputs[one.name] for one in self.known.graph.input}
        return dict(zip(names, ReferenceEvaluator(self.known).run(names, asked), strict=True))


def cut(path: str | Path) -> Staging:
    """Return the stages of an ONNX file; Uncut where it has no decisions, or such as nobody can hand weights to."""
    path = Path(path)
    model = onnx.load(path, load_external_data=False)
    return _Cutter(model, path.parent).staging()


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


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    """What one expert computes."""

    nodes: Sequence[NodeProto]
    output: str
    weights: Mapping[str, onnx.TensorProto]  # that its branches hold


@dataclass(frozen=True, kw_only=True)
class _Experts:
    """An `If` tree, written as one expert whose weights are inputs."""

    nodes: Sequence[NodeProto]
    decision: str
    weights: Mapping[str, Sequence[np.ndarray]]
    reads: frozenset[str]  # tensors of the graph


class _Cutter:
    """Takes one graph apart."""

    def __init__(self, model: ModelProto, folder: Path):
        self._model, self._folder = model, folder
        graph = model.graph
        self._weights = {one.name: one for one in graph.initializer}
        self._made = {name: node for node in graph.node for name in node.output}
        values = [*graph.value_info, *graph.input, *graph.output]
        self._infos = {one.name: one for one in values}
        self._inputs = [one.name for one in graph.input]
        self._constant: dict[str, bool] = {}

    def staging(self) -> Staging:
        """Cut."""
        graph = self._model.graph
        experts = {
            node.output[0]: self._experts(node) for node in graph.node if node.op_type == 'If'
        }
        if not experts:
            raise Uncut('it has no conditions')
        decisions = {one.decision for one in experts.values()}
        needed = self._needed(experts, decisions)
        stage = self._stages(experts, needed)
        known = sorted(one for one in decisions if stage[one] == HOST)
        steps = [[] for _ in range(1 + max(stage[name] for name in needed))]
        for node in graph.node:
            name = node.output[0]
            if name in needed and stage[name] != HOST and not self._is_constant(name):
                steps[stage[name]].append(node)
        return Staging(
            inputs={one.name: _port(one) for one in graph.input},
            outputs={one.name: _port(one) for one in graph.output},
            sizes={one.name: _sizes(one) for one in graph.input},
            stages=[
                self._stage(number, nodes, experts, stage, decisions)
                for number, nodes in enumerate(steps)
            ],
            known=self._known(known) if known else None,
        )

    # ---- what is an expert ----

    def _experts(self, node: NodeProto) -> _Experts:
        leaves, conditions, arithmetic = self._tree(node)
        decision = self._decision(node)
        order = self._order(node, conditions, arithmetic, decision, len(leaves))
        if sorted(order) != list(range(len(leaves))):
            raise Uncut(f'{node.name}: not each number has an expert of its own')
        return self._join(node, [leaves[index] for index in order], decision)

    def _tree(self, node: NodeProto) -> tuple[list[_Leaf], dict, list[NodeProto]]:
        """Return the leaves, the places of the leaves behind each condition, and the nodes that reckon with the number."""
        leaves: list[_Leaf] = []
        arithmetic: list[NodeProto] = []

        def walk(one: NodeProto, weights):
            branches = {a.name: a.g for a in one.attribute if a.type == AttributeProto.GRAPH}
            ways = []
            for branch in (branches['then_branch'], branches['else_branch']):
                own = {**weights, **{w.name: w for w in branch.initializer}}
                inner = [n for n in branch.node if n.op_type == 'If']
                if not inner:
                    ways.append(len(leaves))
                    leaves.append(
                        _Leaf(nodes=branch.node, output=branch.output[0].name, weights=own)
                    )
                    continue
                rest = [n for n in branch.node if n.op_type != 'If']
                if len(inner) > 1 or any(n.op_type not in (*_INDEX, 'Constant') for n in rest):
                    raise Uncut(f'{one.name}: a branch does more than choose')
                arithmetic.extend(rest)
                ways.append(walk(inner[0], own))
            return one.input[0], *ways

        return leaves, walk(node, {}), arithmetic

    def _decision(self, node: NodeProto) -> str:
        """Return the single number that the condition is about."""
        name = node.input[0]
        while (made := self._made.get(name)) is not None and made.op_type in _INDEX:
            sources = [one for one in made.input if not self._is_constant(one)]
            if len(sources) != 1 or self._count(sources[0]) != 1:
                break
            name = sources[0]
        if self._count(name) != 1 or self._infos[name].type.tensor_type.elem_type not in (6, 7):
            raise Uncut(f'{node.name}: its condition is about no number')
        return self._alike(name)

    def _count(self, name: str) -> int:
        """Return how many values a tensor has, 0 where that is open."""
        sizes = _sizes(self._infos[name]) if name in self._infos else (0,)
        return 0 if any(isinstance(one, str) for one in sizes) else int(np.prod(sizes))

    def _alike(self, name: str) -> str:
        """Return the first tensor that is made as this one is: layers read the number of their level each for themselves."""
        if name not in self._made:
            return name
        asked = self._way(name)
        return next(other for other in self._made if self._way(other) == asked)

    def _way(self, name: str) -> tuple:
        """Return what a tensor is made of, the same for two that are always equal."""
        node = self._made[name]
        inputs = tuple(
            self._array(self._weights[one]).tobytes()
            if one in self._weights and self._count_of(self._weights[one]) < 16
            else one
            for one in node.input
        )
        attributes = tuple(one.SerializeToString() for one in node.attribute)
        return node.op_type, list(node.output).index(name), inputs, attributes

    def _count_of(self, weight: onnx.TensorProto) -> int:
        return int(np.prod(weight.dims, dtype=np.int64))

    def _order(self, node, conditions, arithmetic, decision, count) -> list[int]:
        """Return the leaf that each number leads to, by reckoning with it as the graph does."""
        nodes, asked = list(arithmetic), [name for name, *_ in _conditions(conditions)]
        have = {name for one in nodes for name in one.output} | {decision}
        todo = [*asked, *(name for one in nodes for name in one.input)]
        while todo:
            name = todo.pop()
            if name in have or name in self._weights or not name:
                continue
            if name not in self._made:
                raise Uncut(f'{node.name}: its choice depends on {name}')
            have.update(self._made[name].output)
            alike = self._alike(name) == decision
            made = (
                onnx.helper.make_node('Identity', [decision], [name])
                if alike
                else self._made[name]
            )
            nodes.append(made)
            todo += made.input
        graph = onnx.helper.make_graph(
            _sorted(nodes),
            'order',
            [self._info(decision)],
            [onnx.ValueInfoProto(name=name) for name in asked],
            self._constants(nodes),
        )
        reckon = ReferenceEvaluator(self._as_model(graph))
        shape, kind = _sizes(self._infos[decision]), _port(self._infos[decision]).dtype
        found = []
        for number in range(count):
            answers = reckon.run(asked, {decision: np.full(shape, number, kind)})
            taken, place = dict(zip(asked, answers, strict=True)), conditions
            while isinstance(place, tuple):
                place = place[1] if bool(np.all(taken[place[0]])) else place[2]
            found.append(place)
        return found

    def _join(self, node: NodeProto, leaves: Sequence[_Leaf], decision: str) -> _Experts:
        """Return one expert that takes as inputs what differs between the leaves."""
        first = leaves[0]
        roles: dict[str, list[onnx.TensorProto]] = {}
        for leaf in leaves[1:]:
            self._compare(node, first, leaf)
        for place, one in enumerate(first.nodes):
            if one.op_type in FIXED:
                raise Uncut(f'{node.name}: weights of integers are constants')
            for slot, name in enumerate(one.input):
                own = [self._weight(leaf, leaf.nodes[place].input[slot]) for leaf in leaves]
                if name in roles or own[0] is None:
                    continue
                if any(weight is not own[0] for weight in own):
                    roles[name] = own
        values = {name: [self._array(one) for one in own] for name, own in roles.items()}
        nodes, renamed = [], {first.output: node.output[0]}
        for one in first.nodes:
            if one.op_type == 'Cast' and one.input[0] in values:  # once, not at each run
                [to] = [a.i for a in one.attribute if a.name == 'to']
                kind = onnx.helper.tensor_dtype_to_np_dtype(to)
                values[one.output[0]] = [v.astype(kind) for v in values.pop(one.input[0])]
                continue
            copy = NodeProto()
            copy.CopyFrom(one)
            copy.ClearField('input')
            copy.input.extend(one.input)
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
        return _Experts(
            nodes=nodes,
            decision=decision,
            weights={names[name]: own for name, own in values.items()},
            reads=frozenset(reads - made - values.keys()),
        )

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

    def _weight(self, leaf: _Leaf, name: str) -> onnx.TensorProto | None:
        return leaf.weights.get(name) or self._weights.get(name)

    # ---- what belongs together ----

    def _stages(self, experts: Mapping[str, _Experts], needed: set[str]) -> dict[str, int]:
        """Return the stage in which each tensor is made: what decides as early as can be, all else as late as can be."""
        stage = dict.fromkeys([*self._inputs, *self._weights, ''], HOST)
        for node in self._model.graph.node:
            own = experts.get(node.output[0])
            if own is not None:
                number = max(0, stage[own.decision] + 1, *(stage[name] for name in own.reads))
            else:
                number = max((stage[name] for name in _reads(node)), default=HOST)
                is_constant = self._is_constant(node.output[0])
                if number == HOST and node.op_type not in _SMALL and not is_constant:
                    number = 0
            stage.update(dict.fromkeys(node.output, number))
        last = max(stage[name] for name in needed)
        late = {one.decision: stage[one.decision] for one in experts.values()}
        for node in reversed(self._model.graph.node):
            if stage[node.output[0]] == HOST or needed.isdisjoint(node.output):
                continue
            number = min(late.get(name, last) for name in node.output)
            late.update(dict.fromkeys(node.output, number))
            own = experts.get(node.output[0])
            for name in own.reads if own is not None else _reads(node):
                late[name] = min(late.get(name, last), number)
        return {
            name: number if number == HOST else late.get(name, number)
            for name, number in stage.items()
        }

    def _needed(self, experts, decisions) -> set[str]:
        """Return the tensors that outputs and decisions depend on, once the trees are gone."""
        todo = [*(one.name for one in self._model.graph.output), *decisions]
        needed: set[str] = set()
        while todo:
            name = todo.pop()
            if name in needed or name not in self._made:
                continue
            node = self._made[name]
            needed.update(node.output)
            own = experts.get(name)
            todo += own.reads if own is not None else _reads(node)
        return needed

    def _stage(self, number, nodes, experts, stage, decisions) -> Stage:
        body: list[NodeProto] = []
        for node in nodes:
            own = experts.get(node.output[0])
            body += own.nodes if own is not None else [node]
        weights = {
            name: Choice(decision=own.decision, values=values)
            for node in nodes
            if (own := experts.get(node.output[0])) is not None
            for name, values in own.weights.items()
        }
        made = {name for node in body for name in node.output}
        body = [*self._copies(body, made, stage), *body]
        made = {name for node in body for name in node.output}
        reads = dict.fromkeys(name for node in body for name in _reads(node) if name)
        taken = [name for name in reads if name not in made | self._weights.keys()]
        crossing = [name for name in taken if name not in weights]
        infos = [self._info(name) for name in crossing]
        infos += [_weight_info(name, one.values[0]) for name, one in weights.items()]
        later = {
            name for other, node in self._all(experts) if stage[other] > number for name in node
        }
        ends = {one.name for one in self._model.graph.output} | decisions | later
        outputs = [name for node in nodes for name in node.output if name in ends]
        graph = onnx.helper.make_graph(
            body,
            f'{self._model.graph.name}_{number}',
            infos,
            [self._info(name) for name in outputs],
            self._constants(body),
        )
        return Stage(
            model=self._as_model(graph),
            inputs={one.name: _port(one) for one in infos},
            sizes={one.name: _sizes(one) for one in infos},
            outputs=outputs,
            choices=weights,
        )

    def _all(self, experts) -> Iterator[tuple[str, Sequence[str]]]:
        """Yield each tensor that is made, with what it is made from."""
        for node in self._model.graph.node:
            own = experts.get(node.output[0])
            yield node.output[0], tuple(own.reads) if own is not None else tuple(_reads(node))

    def _copies(self, body, made, stage) -> list[NodeProto]:
        """Return what a stage needs that depends on constants, or on few numbers, alone: it is made anew in each stage."""
        todo = [name for node in body for name in _reads(node)]
        found: dict[int, NodeProto] = {}
        while todo:
            name = todo.pop()
            node = self._made.get(name)
            if node is None or name in made or stage[name] != HOST:
                continue
            found[id(node)] = node
            todo += _reads(node)
        return [node for node in self._model.graph.node if id(node) in found]

    def _known(self, names: Sequence[str]) -> ModelProto:
        nodes: dict[int, NodeProto] = {}
        todo = list(names)
        while todo:
            node = self._made.get(todo.pop())
            if node is not None:
                nodes[id(node)] = node
                todo += node.input
        body = [node for node in self._model.graph.node if id(node) in nodes]
        reads = {name for node in body for name in node.input}
        graph = onnx.helper.make_graph(
            body,
            'known',
            [self._info(name) for name in self._inputs if name in reads],
            [self._info(name) for name in names],
            self._constants(body),
        )
        return self._as_model(graph)

    # ---- tensors ----

    def _is_constant(self, name: str) -> bool:
        if name not in self._constant:
            node = self._made.get(name)
            self._constant[name] = (
                name in self._weights or not name
                if node is None
                else all(self._is_constant(one) for one in _reads(node))
            )
        return self._constant[name]

    def _constants(self, nodes: Sequence[NodeProto]) -> list[onnx.TensorProto]:
        reads = dict.fromkeys(name for node in nodes for name in _reads(node))
        return [self._weights[name] for name in reads if name in self._weights]

    def _array(self, weight: onnx.TensorProto) -> np.ndarray:
        return numpy_helper.to_array(weight, str(self._folder))

    def _info(self, name: str) -> onnx.ValueInfoProto:
        if name not in self._infos:
            raise Uncut(f'the file does not say what {name} is')
        return self._infos[name]

    def _as_model(self, graph: GraphProto) -> ModelProto:
        return onnx.helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
        )


def _reads(node: NodeProto) -> Iterator[str]:
    """Yield what a node reads, within its subgraphs too."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            inner = attribute.g
            own = {name for one in inner.node for name in one.output}
            own |= {one.name for one in (*inner.initializer, *inner.input)}
            yield from (name for one in inner.node for name in _reads(one) if name not in own)


def _conditions(tree) -> Iterator[tuple]:
    if isinstance(tree, tuple):
        yield tree
        for way in tree[1:]:
            yield from _conditions(way)


def _sorted(nodes: Sequence[NodeProto]) -> list[NodeProto]:
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


def _port(info: onnx.ValueInfoProto) -> Port:
    kind = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
    return Port(kind, tuple(one if isinstance(one, int) else None for one in _sizes(info)))


def _sizes(info: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(
        one.dim_value if one.HasField('dim_value') else one.dim_param
        for one in info.type.tensor_type.shape.dim
    )


def _weight_info(name: str, value: np.ndarray) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, value.shape)

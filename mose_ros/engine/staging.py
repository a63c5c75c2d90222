"""Cuts a graph at the decisions inside it, so that the weights of an expert are inputs and no condition is left.

    whole:   see -> route -> If(skill) { expert 0 | expert 1 | ... } -> go on
    stages:  see -> route  |  go on, with the weights of one expert as inputs

Whoever runs the stages reads the decision between them and hands over the weights of the expert that it names: on a GPU that
is another address. What is left can be recorded as a CUDA graph, which a condition can't. Stages keep the names of the graph's
tensors and its operators, and refer to the same files of weights, so each is a graph like any other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto
from onnx.reference import ReferenceEvaluator

from mose_ros.engine.experts import INDEX, find_experts
from mose_ros.engine.onnx_graph import OnnxGraph, Uncut, port_of, reads, sizes_of
from mose_ros.engine.session import Port

HOST = -1  # the stage of what follows from the graph's inputs alone
# of numbers that come with the inputs: too little to pass from stage to stage
_SMALL = (*INDEX, 'Constant', 'Unsqueeze', 'Split', 'Slice', 'GreaterOrEqual', 'Max', 'Clip')


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
    decide: 'Known'


class Known:
    """What follows from a graph's inputs alone; reckoned on the host, at each run."""

    def __init__(self, model: ModelProto | None):
        """Take the graph that reckons, None where there is nothing to be known."""
        self._evaluator = None if model is None else ReferenceEvaluator(model)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the decisions by the inputs of a run."""
        if self._evaluator is None:
            return {}
        names = self._evaluator.output_names
        asked = {name: inputs[name] for name in self._evaluator.input_names}
        return dict(zip(names, self._evaluator.run(names, asked), strict=True))


def cut(path: str | Path) -> Staging:
    """Return the stages of an ONNX file; Uncut where it has no decisions, or such as nobody can hand weights to."""
    return _Cutter(OnnxGraph(path)).staging()


class _Cutter:
    """Takes one graph apart."""

    def __init__(self, graph: OnnxGraph):
        self._graph = graph
        self._experts = find_experts(graph)
        if not self._experts:
            raise Uncut('it has no conditions')
        self._decisions = {one.decision for one in self._experts.values()}
        self._needed = self._find_needed()
        self._stage = self._find_stages()

    def staging(self) -> Staging:
        """Cut."""
        graph, stage = self._graph, self._stage
        steps = [[] for _ in range(1 + max(stage[name] for name in self._needed))]
        for node in graph.nodes:
            name = node.output[0]
            if name in self._needed and stage[name] != HOST and not graph.is_constant(name):
                steps[stage[name]].append(node)
        return Staging(
            inputs={one.name: port_of(one) for one in graph.inputs},
            outputs={one.name: port_of(one) for one in graph.outputs},
            sizes={one.name: sizes_of(one) for one in graph.inputs},
            stages=[self._part(number, nodes) for number, nodes in enumerate(steps)],
            decide=Known(self._known()),
        )

    def _reads(self, node: NodeProto) -> Iterator[str]:
        """Yield what a node reads, once the trees are gone."""
        own = self._experts.get(node.output[0])
        yield from own.reads if own is not None else reads(node)

    def _find_needed(self) -> set[str]:
        """Return the tensors that outputs and decisions depend on."""
        todo = [*(one.name for one in self._graph.outputs), *self._decisions]
        needed: set[str] = set()
        while todo:
            name = todo.pop()
            if name not in needed and name in self._graph.makers:
                node = self._graph.makers[name]
                needed.update(node.output)
                todo += self._reads(node)
        return needed

    def _find_stages(self) -> dict[str, int]:
        """Return the stage in which each tensor is made: what decides as early as can be, all else as late as can be."""
        graph, experts = self._graph, self._experts
        inputs = [one.name for one in graph.inputs]
        stage = dict.fromkeys([*inputs, *graph.weights, ''], HOST)
        for node in graph.nodes:
            name = node.output[0]
            number = max((stage[one] for one in self._reads(node)), default=HOST)
            if name in experts:
                number = max(0, number, stage[experts[name].decision] + 1)
            elif number == HOST and node.op_type not in _SMALL and not graph.is_constant(name):
                number = 0
            stage.update(dict.fromkeys(node.output, number))
        last = max(stage[name] for name in self._needed)
        late = {name: stage[name] for name in self._decisions}
        for node in reversed(graph.nodes):
            if stage[node.output[0]] == HOST or self._needed.isdisjoint(node.output):
                continue
            number = min(late.get(name, last) for name in node.output)
            late.update(dict.fromkeys(node.output, number))
            for name in self._reads(node):
                late[name] = min(late.get(name, last), number)
        return {
            name: number if number == HOST else late.get(name, number)
            for name, number in stage.items()
        }

    def _part(self, number: int, nodes: Sequence[NodeProto]) -> Stage:
        body: list[NodeProto] = []
        choices: dict[str, Choice] = {}
        for node in nodes:
            own = self._experts.get(node.output[0])
            body += own.nodes if own is not None else [node]
            if own is not None:
                for name, values in own.weights.items():
                    choices[name] = Choice(decision=own.decision, values=values)
        body = [*self._copies(body), *body]
        made = {name for node in body for name in node.output}
        used = dict.fromkeys(name for node in body for name in reads(node) if name)
        infos = [
            _weight_info(name, choices[name].values[0])
            if name in choices
            else self._graph.info(name)
            for name in used
            if name not in made | self._graph.weights.keys()
        ]
        ends = {one.name for one in self._graph.outputs} | self._decisions | self._later(number)
        outputs = [name for node in nodes for name in node.output if name in ends]
        ends_infos = [self._graph.info(name) for name in outputs]
        return Stage(
            model=self._graph.part(f'{self._graph.name}_{number}', body, infos, ends_infos),
            inputs={one.name: port_of(one) for one in infos},
            sizes={one.name: sizes_of(one) for one in infos},
            outputs=outputs,
            choices=choices,
        )

    def _later(self, number: int) -> set[str]:
        """Return what the stages behind a stage read."""
        return {
            name
            for node in self._graph.nodes
            if self._stage[node.output[0]] > number
            for name in self._reads(node)
        }

    def _copies(self, body: Sequence[NodeProto]) -> list[NodeProto]:
        """Return what a stage needs that depends on constants, or on few numbers, alone: it is made anew in each stage."""
        made = {name for node in body for name in node.output}
        needed = {name for node in body for name in reads(node)} - made
        return self._graph.behind(
            [name for name in needed if name in self._stage and self._stage[name] == HOST]
        )

    def _known(self) -> ModelProto | None:
        names = sorted(one for one in self._decisions if self._stage[one] == HOST)
        if not names:
            return None
        body = self._graph.behind(names)
        used = {name for node in body for name in reads(node)}
        inputs = [one for one in self._graph.inputs if one.name in used]
        return self._graph.part('known', body, inputs, [self._graph.info(one) for one in names])


def _weight_info(name: str, value: np.ndarray) -> ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, value.shape)

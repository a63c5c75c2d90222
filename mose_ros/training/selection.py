"""The ways of choosing an expert, as graphs that differ in nothing else: what `bench --selection` holds against each other.

`python -m mose_ros.training.selection BUNDLE OUT [--graph prefill|decode]` takes a bundle's graph apart and writes OUT/WAY.onnx:

constant: one expert of each mixture is built in, the others are gone: what choosing costs is held against it.
if: the graph as it is, a tree of conditions.
inputs: the chosen expert's weights are inputs of the graph.
gather: the chosen expert's weights are gathered from those of all.
all: all experts are computed, and one answer is gathered.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper

from mose_ros.core.bundle import Manifest

CHOICES = {'prefill': 'skill_override', 'decode': 'skills'}  # graph -> its input that chooses


class Tree:
    """A tree of conditions in a graph, which leads to one of several experts that differ in their weights alone."""

    def __init__(self, root: NodeProto):
        self.output = root.output[0]
        self.leaves = [list(leaf) for leaf in _leaves(root)]
        made = [{name for node in leaf for name in node.output} for leaf in self.leaves]
        reads = [
            [name for node in leaf for name in node.input if name not in own]
            for leaf, own in zip(self.leaves, made, strict=True)
        ]
        self.weights = [names for names in zip(*reads, strict=True) if len(set(names)) > 1]

    def leaf(
        self, index: int, weights: Sequence[str] | None = None, output: str = ''
    ) -> list[NodeProto]:
        """Return the nodes of an expert under names of their own, which give `output` from these weights."""
        nodes = deepcopy(self.leaves[index])
        last, output = nodes[-1].output[0], output or self.output
        new = {
            names[index]: name for names, name in zip(self.weights, weights or (), strict=False)
        }
        for node in nodes:
            for name in node.output:
                new[name] = output if name == last else f'{output}.{index}.{name}'
        for node in nodes:
            node.input[:] = [new.get(name, name) for name in node.input]
            node.output[:] = [new.get(name, name) for name in node.output]
        return nodes


def _leaves(node: NodeProto):
    branches = {one.name: one.g for one in node.attribute if one.type == AttributeProto.GRAPH}
    for name in ('then_branch', 'else_branch'):
        inner = [one for one in branches[name].node if one.op_type == 'If']
        if inner:
            yield from _leaves(inner[0])
        else:
            yield branches[name].node


def write_ways(bundle: Path, out: Path, graph: str = 'prefill') -> list[Path]:
    """Write the graphs of all ways and return where they are; ValueError for a bundle that chooses no expert."""
    Manifest.load(bundle)  # whole and unchanged
    if graph not in CHOICES:
        raise ValueError(f'no graph {graph!r} with experts of levels; known: {", ".join(CHOICES)}')
    model = onnx.load(bundle / f'{graph}.onnx')
    if not any(node.op_type == 'If' for node in model.graph.node):
        raise ValueError(f'{bundle / graph}.onnx chooses no expert: its mixtures are of tokens')
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for way, change in WAYS.items():
        changed = deepcopy(model)
        if way != 'if':
            _lift(changed.graph)
        change(changed.graph, CHOICES[graph])
        path = out / f'{way}.onnx'
        onnx.save(changed, path)
        written.append(path)
    return written


def _lift(graph) -> None:
    """Move the weights of all branches, with the Casts behind them, out into the graph: undo `folding.sink`."""
    casts = []

    def lift(node):
        for branch in [one.g for one in node.attribute if one.type == AttributeProto.GRAPH]:
            own, kept = {one.name for one in branch.initializer}, []
            for one in deepcopy(list(branch.node)):
                (casts if one.op_type == 'Cast' and one.input[0] in own else kept).append(one)
            graph.initializer.extend(branch.initializer)
            graph.value_info.extend(branch.value_info)
            del branch.initializer[:], branch.value_info[:], branch.node[:]
            branch.node.extend(kept)
            for one in branch.node:
                lift(one)

    for node in graph.node:
        lift(node)
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])


def _replace_trees(graph, replacement: Callable[[int, Tree], list[NodeProto]]) -> None:
    """Put nodes in the place of each tree, which are counted in the order of depth."""
    nodes, count = [], 0
    for node in graph.node:
        if node.op_type != 'If':
            nodes.append(node)
            continue
        nodes += replacement(count, Tree(node))
        count += 1
    del graph.node[:]
    graph.node.extend(nodes)


def _constant(graph, choice):
    _replace_trees(graph, lambda place, tree: tree.leaf(0))


def _inputs(graph, choice):
    shapes = {one.name: list(one.dims) for one in graph.initializer}
    shapes |= {
        one.name: [dim.dim_value for dim in one.type.tensor_type.shape.dim]
        for one in graph.value_info
    }

    def replacement(place, tree):
        names = [f'expert.{place}.{index}' for index in range(len(tree.weights))]
        graph.input.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[same[0]])
            for name, same in zip(names, tree.weights, strict=True)
        )
        return tree.leaf(0, names)

    _replace_trees(graph, replacement)


def _gather(graph, choice):
    def replacement(place, tree):
        nodes, names = _index(graph, choice, place, tree), []
        for index, same in enumerate(tree.weights):
            stacked, names = f'stacked.{place}.{index}', [*names, f'expert.{place}.{index}']
            nodes += [*_stack(same, stacked, graph), _take(stacked, place, names[-1])]
        return nodes + tree.leaf(0, names)

    _replace_trees(graph, replacement)


def _all(graph, choice):
    def replacement(place, tree):
        answers = [f'answer.{place}.{index}' for index in range(len(tree.leaves))]
        nodes = _index(graph, choice, place, tree)
        for index, answer in enumerate(answers):
            nodes += tree.leaf(index, [same[index] for same in tree.weights], answer)
        stacked = f'stacked.{place}'
        return [*nodes, *_stack(answers, stacked, graph), _take(stacked, place, tree.output)]

    _replace_trees(graph, replacement)


def _index(graph, choice: str, place: int, tree: Tree) -> list[NodeProto]:
    """Return the nodes that read which expert is chosen, as `chosen.PLACE`; -1 counts as the first."""
    constants = {
        f'place.{place}': place,
        f'least.{place}': 0,
        f'most.{place}': len(tree.leaves) - 1,
    }
    graph.initializer.extend(
        helper.make_tensor(name, TensorProto.INT64, (), [value])
        for name, value in constants.items()
    )
    return [
        helper.make_node('Gather', [choice, f'place.{place}'], [f'wish.{place}']),
        helper.make_node(
            'Clip',
            [f'wish.{place}', f'least.{place}', f'most.{place}'],
            [f'chosen.{place}'],
        ),
    ]


def _stack(parts: Sequence[str], name: str, graph) -> list[NodeProto]:
    axis = f'{name}.axis'
    graph.initializer.append(helper.make_tensor(axis, TensorProto.INT64, (1,), [0]))
    rows = [f'{name}.{index}' for index in range(len(parts))]
    return [
        *(
            helper.make_node('Unsqueeze', [part, axis], [row])
            for part, row in zip(parts, rows, strict=True)
        ),
        helper.make_node('Concat', rows, [name], axis=0),
    ]


def _take(stacked: str, place: int, name: str) -> NodeProto:
    return helper.make_node('Gather', [stacked, f'chosen.{place}'], [name], axis=0)


WAYS = {
    'constant': _constant,
    'if': lambda graph, choice: None,
    'inputs': _inputs,
    'gather': _gather,
    'all': _all,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the graphs; return 0, or 1 with the error on stderr."""
    parser = argparse.ArgumentParser(
        prog='python -m mose_ros.training.selection', description=__doc__.split('\n')[0]
    )
    parser.add_argument('bundle', type=Path, help='folder of the bundle')
    parser.add_argument('out', type=Path, help='folder for the graphs')
    parser.add_argument('--graph', choices=list(CHOICES), default='prefill')
    asked = parser.parse_args(arguments)
    try:
        for path in write_ways(asked.bundle, asked.out, asked.graph):
            print(path)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())

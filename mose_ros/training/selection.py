"""One mixture in every way of choosing its expert, as graphs that `bench --selection` holds against each other.

`python -m mose_ros.training.selection BUNDLE OUT` writes, in the sizes of a bundle's network, OUT/<way>.onnx: x f32 (1, T, D) in, y out.

| way | the expert |
|---|---|
| constant | is built in: what the others are held against |
| if | is at the end of a tree of conditions, as in our bundles |
| inputs | is handed in as weights |
| gather | is gathered from the stack of all |
| all | is picked from the answers of all |
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mose_ros.core.bundle import Manifest
from mose_ros.training.graphs import OPSET
from mose_ros.training.twin import config_of

PARTS = ('gate', 'up', 'down')
_FLOAT, _INT = TensorProto.FLOAT, TensorProto.INT64


class _Writer:
    """Nodes and weights of a graph, or of a branch of one."""

    def __init__(self, name: str):
        self.name, self.nodes, self.weights = name, [], []

    def __call__(self, op: str, *inputs: str, **attributes) -> str:
        name = f'{self.name}_{op}_{len(self.nodes)}'
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def weight(self, value: np.ndarray) -> str:
        name = f'{self.name}_weight_{len(self.weights)}'
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def ffn(self, x: str, gate: str, up: str, down: str) -> str:
        """Return SiLU(x gate) * (x up), times down."""
        opened = self('MatMul', x, gate)
        opened = self('Mul', opened, self('Sigmoid', opened))
        return self('MatMul', self('Mul', opened, self('MatMul', x, up)), down)


class Mixture:
    """Random weights of a shared FFN and of E experts, and the graphs of them."""

    def __init__(self, width: int, ffn: int, experts: int, seed: int = 0):
        random = np.random.default_rng(seed)
        self.shapes = {'gate': (width, ffn), 'up': (width, ffn), 'down': (ffn, width)}
        self.width = width

        def weights():
            return {
                part: (random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
                for part, shape in self.shapes.items()
            }

        self.shared, self.experts = weights(), [weights() for _ in range(experts)]

    def constant(self, writer: _Writer) -> str:
        """Build the first expert in."""
        return self._expert(writer, 0)

    def tree(self, writer: _Writer) -> str:
        """Branch to the chosen expert."""
        return self._branch(writer, 0, len(self.experts))

    def inputs(self, writer: _Writer) -> str:
        """Take the expert's weights from outside."""
        return writer.ffn('x', *PARTS)

    def gather(self, writer: _Writer) -> str:
        """Copy the chosen expert's weights out of the stack."""
        stacks = [writer.weight(np.stack([one[part] for one in self.experts])) for part in PARTS]
        return writer.ffn('x', *(writer('Gather', one, 'chosen', axis=0) for one in stacks))

    def all(self, writer: _Writer) -> str:
        """Have all experts answer."""
        stacks = [writer.weight(np.stack([one[part] for one in self.experts])) for part in PARTS]
        return writer('Gather', writer.ffn('x', *stacks), 'chosen', axis=0)

    def graph(self, way: str) -> onnx.ModelProto:
        """Return the mixture in one of WAYS."""
        writer = _Writer(way)
        shared = writer.ffn('x', *(writer.weight(self.shared[part]) for part in PARTS))
        both = writer('Add', shared, WAYS[way](self, writer))
        half = writer.weight(np.float32(0.5))
        writer.nodes.append(helper.make_node('Mul', [both, half], ['y']))
        inputs = {'x': (_FLOAT, [1, 'T', self.width])}
        if way in ('if', 'gather', 'all'):
            inputs['chosen'] = (_INT, [1])
        if way == 'inputs':
            inputs |= {part: (_FLOAT, shape) for part, shape in self.shapes.items()}
        graph = helper.make_graph(
            writer.nodes,
            way,
            [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
            [helper.make_tensor_value_info('y', _FLOAT, [1, 'T', self.width])],
            initializer=writer.weights,
        )
        opset = [helper.make_opsetid('', OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model

    def _expert(self, writer: _Writer, index: int) -> str:
        return writer.ffn('x', *(writer.weight(self.experts[index][part]) for part in PARTS))

    def _branch(self, writer: _Writer, first: int, end: int) -> str:
        if end - first == 1:
            return self._expert(writer, first)
        middle = (first + end) // 2
        less = writer('Less', 'chosen', writer.weight(np.array([middle])))
        bodies = {}
        for name, span in (('then_branch', (first, middle)), ('else_branch', (middle, end))):
            inner = _Writer(f'{writer.name}_{span[0]}_{span[1]}')
            result = self._branch(inner, *span)
            value = helper.make_tensor_value_info(result, _FLOAT, [1, 'T', self.width])
            bodies[name] = helper.make_graph(
                inner.nodes, inner.name, [], [value], initializer=inner.weights
            )
        return writer('If', less, **bodies)


WAYS: dict[str, Callable[[Mixture, _Writer], str]] = {
    'constant': Mixture.constant,
    'if': Mixture.tree,
    'inputs': Mixture.inputs,
    'gather': Mixture.gather,
    'all': Mixture.all,
}


def write(mixture: Mixture, out: Path) -> None:
    """Write a mixture in all ways."""
    out.mkdir(parents=True, exist_ok=True)
    for way in WAYS:
        onnx.save_model(mixture.graph(way), out / f'{way}.onnx')


def main(arguments: Sequence[str] | None = None) -> int:
    """Write all ways; return 0, or 1 with the error on stderr."""
    parser = argparse.ArgumentParser(
        prog='python -m mose_ros.training.selection', description=__doc__.splitlines()[0]
    )
    parser.add_argument('bundle', type=Path, help='whose sizes the mixture has')
    parser.add_argument('out', type=Path, help='folder for the graphs')
    options = parser.parse_args(arguments)
    try:
        config = config_of(Manifest.load(options.bundle))
        experts = min(map(len, config.mose.levels.values()))
        write(Mixture(config.decoder.width, config.decoder.ffn, experts), options.out)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""What a graph costs, counted from what ONNX Runtime executes of it: products, bytes, and where the time goes.

FLOPs are those of matrix products and convolutions, two for each multiply-add, in the branches that were taken; what is done
element by element is not counted, as usual. Bytes are what the operators read and write, each for itself, after constants are
folded and before operators are fused: what memory would see without caches. Only DequantizeLinear counts as one with what reads it, as
all runtimes do it: weights of whole numbers are read as they are stored. Needs no onnx package: the runtime's own profile names every
executed operator with its shapes.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import ceil, prod
from pathlib import Path

import numpy as np

from mose_ros.engine.bundle import Bundle
from mose_ros.engine.contestants import PRACTICE, Engine
from mose_ros.engine.session import Session

STAGES = {  # graph -> the stage that it is most of
    'view_router': 'glance',
    'vision': 'vision',
    'prefill': 'prefill',
    'action': 'flow',
    'decode': 'decode',
}
CONTROL = ('If', 'Loop', 'Scan')  # their bodies are in the profile too
UNCOUNTED = ('Einsum', 'RNN', 'LSTM', 'GRU', 'ConvTranspose', 'DeformConv', 'Attention')
_SIZES = {'bool': 1, 'int8': 1, 'uint8': 1, 'float16': 2, 'bfloat16': 2, 'int16': 2, 'uint16': 2}
_SIZES |= {'float': 4, 'int32': 4, 'uint32': 4, 'double': 8, 'int64': 8, 'uint64': 8}
_SIZES |= {'Int4x2': 0.5, 'UInt4x2': 0.5}  # shapes are of the numbers, not of the pairs


@dataclass(frozen=True, kw_only=True)
class Executed:
    """One operator of one run."""

    op: str
    inputs: Sequence[tuple[str, tuple[int, ...]]]  # type, shape
    outputs: Sequence[tuple[str, tuple[int, ...]]]
    ms: float

    @property
    def flops(self) -> int:
        """Return the FLOPs of a product, 0 for what is none; ValueError for a product that cannot be counted."""
        if self.op in UNCOUNTED:
            raise ValueError(f'the FLOPs of {self.op} cannot be counted; write it with MatMul')
        if self.op in ('MatMul', 'MatMulInteger', 'MatMulNBits', 'QLinearMatMul'):
            return 2 * prod(self.outputs[0][1]) * self.inputs[0][1][-1]
        if self.op == 'Gemm':  # whichever side is transposed, A has M * K numbers
            result = self.outputs[0][1]
            return 2 * prod(result) * (prod(self.inputs[0][1]) // max(result[0], 1))
        if self.op in ('Conv', 'ConvInteger', 'QLinearConv'):
            kernel = self.inputs[3 if self.op == 'QLinearConv' else 1][1]
            return 2 * prod(self.outputs[0][1]) * prod(kernel[1:])
        return 0

    @property
    def bytes(self) -> int:
        """Return the bytes that are read and written; ValueError for a type whose size is not known.

        Of DequantizeLinear what its reader will count is taken off, so that both together read what is stored.
        """
        read, written = _nbytes(self.inputs), _nbytes(self.outputs)
        return read - written if self.op == 'DequantizeLinear' else read + written


def _nbytes(values: Sequence[tuple[str, tuple[int, ...]]]) -> int:
    unknown = [kind for kind, _ in values if kind not in _SIZES]
    if unknown:
        raise ValueError(f'the bytes of a tensor of {unknown[0]} cannot be counted')
    return sum(ceil(_SIZES[kind] * prod(shape)) for kind, shape in values)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What some runs cost."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: 'Cost') -> 'Cost':
        return Cost(flops=self.flops + other.flops, bytes=self.bytes + other.bytes)


def cost(path: str | Path, inputs: Mapping[str, np.ndarray]) -> Cost:
    """Return what one run of a graph with these inputs costs."""
    done = profile(path, inputs, fused=False)
    return Cost(flops=sum(one.flops for one in done), bytes=sum(one.bytes for one in done))


def profile(
    path: str | Path,
    inputs: Mapping[str, np.ndarray],
    *,
    fused: bool = True,
    threads: int = 1,
    runs: int = 1,
) -> list[Executed]:
    """Run a graph some times on the CPU and return its operators, each with the least time that it took.

    fused: as the runtime runs it; else with constants folded only, so that products are those of the standard.
    """
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if fused else levels.ORT_ENABLE_BASIC
    options.intra_op_num_threads = threads
    options.add_session_config_entry(
        'session.intra_op.allow_spinning', '0'
    )  # as the engine runs it
    options.log_severity_level = 3
    options.enable_profiling = True
    if not fused:  # a packed weight has no shape in the profile
        options.add_session_config_entry('session.disable_prepacking', '1')
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / 'profile')
        session = onnxruntime.InferenceSession(
            str(path), options, providers=['CPUExecutionProvider']
        )
        for _ in range(runs):
            session.run(None, dict(inputs))
        events = json.loads(Path(session.end_profiling()).read_text(encoding='utf-8'))
    kernels = [
        one
        for one in events
        if one['cat'] == 'Node'
        and one['name'].endswith('_kernel_time')
        and one['args']['op_name'] not in CONTROL
    ]
    length = len(kernels) // runs  # the same inputs take the same branches
    return [
        _executed(one, min(kernels[place + run * length]['dur'] for run in range(runs)))
        for place, one in enumerate(kernels[:length])
    ]


def _executed(event, microseconds: float) -> Executed:
    told = event['args']
    values = {
        side: [
            (kind, tuple(shape))
            for one in told.get(f'{side}_type_shape', [])
            for kind, shape in one.items()
        ]
        for side in ('input', 'output')
    }
    return Executed(
        op=told['op_name'],
        inputs=values['input'],
        outputs=values['output'],
        ms=microseconds / 1e3,
    )


def operators(done: Sequence[Executed], most: int = 8) -> dict[str, dict[str, float]]:
    """Return the operators that took most of a profile: how many, their milliseconds, their share of all."""
    total = sum(one.ms for one in done) or 1.0
    rows: dict[str, dict[str, float]] = {}
    for one in done:
        row = rows.setdefault(one.op, {'count': 0, 'ms': 0.0})
        row['count'] += 1
        row['ms'] += one.ms
    largest = sorted(rows.items(), key=lambda item: -item[1]['ms'])[:most]
    return {op: {**row, 'share': row['ms'] / total} for op, row in largest}


# ---- a bundle's stages ----


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One run of a graph, as the engine did it."""

    graph: str
    inputs: Mapping[str, np.ndarray]
    threads: int


@dataclass(frozen=True, kw_only=True)
class Watched(Bundle):
    """A bundle on the CPU whose sessions write down what they are run with."""

    runs: list[Run] = field(default_factory=list)

    @classmethod
    def of(cls, bundle: Bundle) -> 'Watched':
        """Return a bundle to be watched."""
        own = {one.name: getattr(bundle, one.name) for one in fields(bundle)}
        return cls(**{**own, 'backend': 'onnxruntime'})

    def session(self, graph: str, *, threads: int | None = None) -> Session:
        """Open a graph, and write down its runs."""
        opened = super().session(graph, threads=threads)
        return _Noting(opened, graph, threads or self.threads, self.runs)


class _Noting:
    def __init__(self, session, graph, threads, runs):
        self._session, self._graph, self._threads, self._runs = session, graph, threads, runs

    def __getattr__(self, name):
        return getattr(self._session, name)

    def run(self, inputs, *more, **options):
        values = {
            name: np.array(value if isinstance(value, np.ndarray) else value.numpy())
            for name, value in inputs.items()
        }
        self._runs.append(Run(graph=self._graph, inputs=values, threads=self._threads))
        return self._session.run(inputs, *more, **options)


def watch(ours: Engine) -> list[Run]:
    """Return the runs of a plan of an engine as this one, and of the first decoded token of its text."""
    watched = Watched.of(ours.bundle)
    engine = Engine(watched, ours.scenery, ours.looking)
    for index in range(PRACTICE):
        watched.runs.clear()
        engine.plan(index)
    words = engine.policy.reason()
    for _ in words:
        if any(one.graph == 'decode' for one in watched.runs):
            break
    words.close()
    return watched.runs


def stage_costs(bundle: Bundle, runs: Sequence[Run]) -> dict[str, Cost]:
    """Return what each stage costs: all its runs of a plan, for `decode` one token."""
    known: dict[str, Cost] = {}
    found = dict.fromkeys(STAGES.values(), Cost())
    for one in runs:
        if one.graph == 'decode' and one.graph in known:
            continue
        if one.graph not in known:  # a graph's shapes do not change within a plan
            known[one.graph] = cost(bundle.folder / f'{one.graph}.onnx', one.inputs)
        found[STAGES[one.graph]] += known[one.graph]
    return found


def plan_flops(costs: Mapping[str, Cost]) -> int:
    """Return the FLOPs of a whole plan: all stages but the text."""
    return sum(one.flops for stage, one in costs.items() if stage != 'decode')

"""How long a bundle takes on this machine, stage by stage, beside other programs, and what it costs.

All that is compared takes turns in one run (`turns`). What is not the engine's runs in a process of its own (`opponents`); networks
that do not exist yet are made by one (`twins`). Speed does not depend on what the pictures show but for the length of the text,
which is given per token.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mose_ros.core.bundle import MANIFEST, sha256
from mose_ros.core.process import resident_bytes
from mose_ros.core.provenance import commit, machine, versions
from mose_ros.engine import counting, turns, twins
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.contestants import (
    CPU,
    LARGE,
    PRACTICE,
    Engine,
    Graph,
    Looking,
    Peaks,
    Talking,
    Words,
)
from mose_ros.engine.counting import Cost
from mose_ros.engine.matches import COMPARED, Setting, join
from mose_ros.engine.memory import MIB, peak_bytes
from mose_ros.engine.opponents import OpponentError
from mose_ros.engine.scenery import Scenery
from mose_ros.engine.session import Session, open_session
from mose_ros.engine.turns import Contestant, Turn

PARTS = ('views', 'reasoning', 'steps', 'operators')
STEPS = (1, 2, 3, 4, 5, 7, 10, 20)  # of the flow
REFERENCE_STEPS = 10
TOKENS = 96  # of a mixture that is measured alone


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured."""

    bundle: Bundle
    plans: int = 200
    warmup: int = 20
    looking: Looking = Looking()
    clip: str = ''  # folder of a recorded clip; '': noise
    parts: Sequence[str] = PARTS
    compare: Sequence[str] = ()
    checkpoint: Path | None = None  # the bundle's, for PyTorch; None: a twin of random weights
    int8: Path | None = None  # bundle of the same network
    selection: Path | None = None  # folder of graphs that choose an expert: constant.onnx, others
    made: Path = field(default_factory=twins.default_folder)  # where twins are kept

    def __post_init__(self):
        for given, known in ((self.parts, PARTS), (self.compare, COMPARED)):
            if unknown := [one for one in given if one not in known]:
                raise ValueError(f'no {unknown[0]!r} to measure; known: {", ".join(known)}')
        if 'int8' in self.compare and self.int8 is None:
            raise ValueError('int8: name its bundle with --int8, as training export makes it')


def measure(asked: Asked) -> dict[str, Any]:
    """Let all that is asked for take turns, and return the report."""
    bundle, m = asked.bundle, asked.bundle.manifest
    scenery = Scenery(m, clip=asked.clip)
    with contextlib.ExitStack() as stack:
        before = resident_bytes()
        ours = Engine(bundle, scenery, asked.looking)
        looked_at = [ours.plan(index).views for index in range(PRACTICE)][-1]
        memory = _memory(before)
        runs = counting.watch(ours)
        tokens = next(one.inputs['input_ids'].shape[1] for one in runs if one.graph == 'prefill')
        words, hardware = Words(ours), ours.hardware()
        field_: dict[str, Contestant] = {'ours': ours, 'words': words}
        if hardware['provider'] == CPU:
            field_['peaks'] = stack.enter_context(contextlib.closing(Peaks(bundle.threads)))
        if 'reasoning' in asked.parts:
            talker = Engine(bundle, scenery, asked.looking)
            talker.plan(0)
            field_['talking'] = Talking(talker)
        if 'views' in asked.parts:
            field_ |= _looking(bundle, scenery)
        setting = Setting(
            bundle=bundle,
            scenery=scenery,
            looking=asked.looking,
            tokens=tokens,
            clip=asked.clip,
            made=asked.made,
            checkpoint=asked.checkpoint,
            int8=asked.int8,
        )
        matches, failed = [], {}
        for name in asked.compare:
            try:
                matches.append(join(name, setting, stack))
            except OpponentError as error:
                if name != 'torch_compile':
                    raise
                failed[name] = {'error': str(error)}  # a compiler that fails is a result
        for match in matches:
            field_ |= match.field
        field_ |= _ways(asked, runs)
        load = os.getloadavg()[0]
        took = turns.take_turns(field_, asked.plans, asked.warmup)
        load = {'load_before': load, 'load_after': os.getloadavg()[0]}
    costs = counting.stage_costs(bundle, runs)
    if 'peaks' in field_:
        best = field_['peaks'].row()
    else:
        best = {'left_out': f'they are known of the CPU alone, this ran on {hardware["provider"]}'}
    report = {
        'bundle': {'name': m.name, 'commit': m.commit, 'sha256': sha256(bundle.folder / MANIFEST)},
        'backend': bundle.backend,
        'threads': bundle.threads,
        'plans': asked.plans,
        'looked_at': list(looked_at),
        'pictures': asked.clip or 'noise',
        'peaks': best,
        **_stages(took['ours'], words.tokens, costs, best),
        'parity': dict(m.parity),
        'compare': {one.name: one.row(took, counting.plan_flops(costs)) for one in matches}
        | failed,
        'memory': memory,
        'machine': machine() | hardware | load,
        'versions': versions(),
        'commit': commit(),
    }
    if 'views' in asked.parts:
        report['views'] = _views(took)
    if 'reasoning' in asked.parts:
        report['reasoning_interference'] = _interference(took['ours'], took['talking'])
    if asked.selection is not None:
        report['expert_selection'] = _selection(took)
    if 'steps' in asked.parts:
        report['flow_steps'] = flow_steps(ours)
    if 'operators' in asked.parts:
        report['operators'] = _operators(bundle, runs)
    return report


def _memory(before: int) -> dict[str, float]:
    return {
        'python_mib': before / MIB,
        'with_engine_mib': resident_bytes() / MIB,
        'peak_mib': peak_bytes() / MIB,
    }


def _stages(took: Sequence[Turn], tokens, costs: Mapping[str, Cost], peaks) -> dict[str, Any]:
    """Return the rows of the stages, of the whole, and what share of the peaks they reach, where these are known."""
    times = {stage: [one.timings[stage] for one in took] for stage in took[0].timings}
    if tokens:
        times['decode'] = tokens
    stages = {}
    for stage, values in times.items():
        found, spent = turns.row(values), costs.get(stage, Cost())
        seconds = found['p50_ms'] / 1e3
        stages[stage] = {
            **found,
            'flops': spent.flops,
            'bytes': spent.bytes,
        }
        if 'left_out' not in peaks:
            stages[stage] |= {
                'gemm_share': spent.flops / seconds / peaks['gemm_flops'],
                'copy_share': spent.bytes / seconds / peaks['copy_bytes'],
            }
    whole = turns.row([one.ms for one in took])
    parts = [sum(one.timings.values()) for one in took]
    large = [sum(one.timings[stage] for stage in LARGE) / 1e3 for one in took]
    flops = sum(costs[stage].flops for stage in LARGE)
    shares = {}
    if 'left_out' not in peaks:
        shares = {
            'gemm_share': float(flops / np.median(large) / peaks['gemm_flops']),
            # of two that were undisturbed: where others use the cores, medians of both say less
            'gemm_share_best': float(flops / np.min(large) / peaks['gemm_flops_best']),
        }
    return {
        'stages': stages,
        'end_to_end': {
            **whole,
            'flops': counting.plan_flops(costs),
            'p99_to_p50': whole['p99_ms'] / whole['p50_ms'],
            'to_stages': float(np.median([one.ms for one in took]) / np.median(parts)),
        },
        **shares,
    }


# ---- our engine in other ways ----


def _looking(bundle: Bundle, scenery: Scenery) -> dict[str, Contestant]:
    """Return our engine with 6, 2 and 1 view, as far as the bundle has so many cameras."""
    fixed, cameras = len(bundle.manifest.fixed_views), len(bundle.manifest.cameras)
    counts = [count for count in (6, 2, 1) if fixed <= count <= cameras]
    return {f'views {count}': Engine(bundle, scenery, Looking(views=count)) for count in counts}


def _views(took: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """Return vision and prefill with 6, 2 and 1 view, and 6 views over the fewer ones."""
    sums = {
        count: [sum(one.timings[stage] for stage in LARGE) for one in took[f'views {count}']]
        for count in (6, 2, 1)
        if f'views {count}' in took
    }
    found: dict[str, Any] = {f'with_{count}': turns.row(ms) for count, ms in sums.items()}
    for count in (2, 1):
        if {6, count} <= sums.keys():
            found[f'ratio_6_to_{count}'] = turns.ratio(sums[count], sums[6])['ratio']
    return found


def _interference(quiet: Sequence[Turn], talking: Sequence[Turn]) -> dict[str, Any]:
    """Return the trajectory's latency with a text beside it over that without: p99 and p50."""
    with_text, without = (turns.row([one.ms for one in side]) for side in (talking, quiet))
    return {
        'p99_ratio': with_text['p99_ms'] / without['p99_ms'],
        'p50_ratio': with_text['p50_ms'] / without['p50_ms'],
        'with_text': with_text,
        'without': without,
    }


def _ways(asked: Asked, runs) -> dict[str, Contestant]:
    """Return the ways of choosing an expert: graphs that differ in nothing else, `constant` with one expert built in.

    One that was made of a graph of the bundle runs on what that graph ran on.
    """
    if asked.selection is None:
        return {}
    paths = {path.stem: path for path in sorted(asked.selection.glob('*.onnx'))}
    if 'constant' not in paths:
        raise ValueError(f'{asked.selection} has no constant.onnx to hold other ways against')
    threads, experts = asked.bundle.threads, min(map(len, asked.bundle.manifest.levels.values()))
    names = open_session(paths['constant'], backend='onnxruntime', provider='CPU').inputs.keys()
    known = max((one.inputs for one in runs), key=lambda one: len(names & one.keys()))
    options = {'tokens': TOKENS, 'known': known}
    return {f'way {way}': Graph(path, threads, experts, **options) for way, path in paths.items()}


def _selection(took: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    times = {
        name.removeprefix('way '): [one.ms for one in side]
        for name, side in took.items()
        if name.startswith('way ')
    }
    return {
        way: {**turns.ratio(times['constant'], ms), **turns.row(ms)} for way, ms in times.items()
    }


@dataclass(frozen=True, kw_only=True)
class _Shared(Bundle):
    """A bundle each of whose graphs is opened once, for all that are made of it."""

    opened: dict[tuple, Session] = field(default_factory=dict)

    def session(self, graph: str, **options) -> Session:
        key = (graph, *sorted(options.items()))
        if key not in self.opened:
            self.opened[key] = super().session(graph, **options)
        return self.opened[key]


def flow_steps(ours: Engine, plans: int = 20) -> dict[str, Any]:
    """Return how far trajectories of other numbers of steps of the flow are from those of 10, and what the flow takes."""
    bundle = _Shared(**vars(ours.bundle))
    engines = {
        str(steps): Engine(
            replace(bundle, manifest=replace(bundle.manifest, num_steps=steps)),
            ours.scenery,
            ours.looking,
        )
        for steps in STEPS
    }
    took = turns.take_turns(engines, plans, warmup=0)
    answers = {steps: np.stack([one.xy for one in done]) for steps, done in took.items()}
    rows = {}
    for steps, done in took.items():
        gaps = np.linalg.norm(answers[steps] - answers[str(REFERENCE_STEPS)], axis=-1)
        rows[steps] = {
            'trajectory_mean_m': float(gaps.mean()),
            'trajectory_max_m': float(gaps.max()),
            'flow_p50_ms': float(np.median([one.timings['flow'] for one in done])),
        }
    return {'reference': REFERENCE_STEPS, 'default': bundle.manifest.num_steps, 'steps': rows}


def _operators(bundle: Bundle, runs) -> dict[str, Any]:
    """Return where the time of each graph's first run goes on the CPU, as ONNX Runtime's profile tells it."""
    first = {one.graph: one for one in reversed(runs)}
    return {
        graph: counting.operators(
            counting.profile(
                bundle.folder / f'{graph}.onnx', one.inputs, threads=one.threads, runs=10
            )
        )
        for graph, one in first.items()
    }

"""How cost grows with views, the size of a picture, experts and layers: twins of a bundle, each axis in one run, taking turns."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mose_ros.core.provenance import commit, machine, versions
from mose_ros.engine import counting, turns, twins
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.contestants import LARGE, Engine, Looking
from mose_ros.engine.scenery import Scenery

SIZES = (0.5, 1.0, 1.5, 2.0)  # of a view's side, in the manifest's
EXPERTS = (1, 2, 4, 8, 16)
LAYERS = (3, 6, 9, 12)
AXES = ('views', 'size', 'experts', 'layers')


def sweep(
    bundle: Bundle,
    made: Path,
    *,
    plans: int = 200,
    warmup: int = 20,
    axes: Sequence[str] = AXES,
    done: Mapping[str, Any] | None = None,
    keep: Callable[[Mapping[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measure each axis that `done`, an earlier report of the same bundle, lacks; `keep` is called behind each."""
    if unknown := [axis for axis in axes if axis not in AXES]:
        raise ValueError(f'no axis {unknown[0]!r}; known: {", ".join(AXES)}')
    report = {
        'bundle': {'name': bundle.manifest.name, 'commit': bundle.manifest.commit},
        'threads': bundle.threads,
        'sweep': {},
        'machine': machine(),
        'versions': versions(),
        'commit': commit(),
    }
    if done and all(done.get(key) == report[key] for key in ('bundle', 'threads')):
        report['sweep'] |= done.get('sweep', {})
    for axis in axes:
        if axis not in report['sweep']:
            report['sweep'][axis] = _axis(_points(axis, bundle, made), plans, warmup)
            keep(report)
    return report


def _points(axis: str, bundle: Bundle, made: Path) -> dict[str, tuple[Bundle, int]]:
    """Return the points of an axis: how each is called, its bundle, and how many views it looks at (0: its manifest's)."""
    m = bundle.manifest
    if axis == 'views':
        counts = range(len(m.fixed_views), len(m.cameras) + 1)
        return {str(count): (bundle, count) for count in counts}
    if axis == 'size':
        unit = m.patch * m.merge
        sides = [
            [round(x * s / unit) * unit for x in (m.view_width, m.view_height)] for s in SIZES
        ]
        changes = {
            f'{width}x{height}': (
                *('--set', f'vision.view_width={width}'),
                *('--set', f'vision.view_height={height}'),
            )
            for width, height in sides
        }
    else:
        values = EXPERTS if axis == 'experts' else LAYERS
        changes = {str(value): (f'--{axis}', str(value)) for value in values}
    return {name: (twins.opened(bundle, made, one), 0) for name, one in changes.items()}


def _axis(points: Mapping[str, tuple[Bundle, int]], plans: int, warmup: int) -> dict[str, Any]:
    engines = {
        name: Engine(bundle, Scenery(bundle.manifest), Looking(views=views))
        for name, (bundle, views) in points.items()
    }
    took = turns.take_turns(engines, plans, warmup)
    found = {}
    for name, engine in engines.items():
        runs = counting.watch(engine)
        costs = counting.stage_costs(engine.bundle, runs)
        large = [sum(one.timings[stage] for stage in LARGE) for one in took[name]]
        found[name] = {
            **engine.hardware(),
            'end_to_end': turns.row([one.ms for one in took[name]]),
            '_'.join(LARGE): turns.row(large),
            'flops': counting.plan_flops(costs),
            'flops_by_stage': {stage: one.flops for stage, one in costs.items()},
            'weights_mib': _weights(engine.bundle),
            'parity': dict(engine.bundle.manifest.parity),
        }
    return found


def _weights(bundle: Bundle) -> float:
    size = sum((bundle.folder / name).stat().st_size for name in bundle.manifest.files)
    return float(np.round(size / 2**20, 2))


def earlier(path: Path) -> Mapping[str, Any]:
    """Return the report in a file, or nothing where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}

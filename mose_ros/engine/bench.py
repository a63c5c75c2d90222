"""How long a bundle takes on this machine, stage by stage.

Pictures are noise: nothing that is computed depends on what is in them, but the text's length, which is given per token.
"""

import platform
from importlib import metadata
from time import perf_counter

import numpy as np

from mose_ros.core.bundle import Manifest
from mose_ros.core.types import Command, EgoState, Guidance, Observation
from mose_ros.engine.policy import Policy

PACKAGES = ('mose_ros', 'numpy', 'onnxruntime', 'opencv-python', 'opencv-python-headless')


def grey(manifest: Manifest, time: float = 0.0) -> Observation:
    """Return an observation with a grey picture from each of the bundle's cameras."""
    picture = np.full((2 * manifest.view_height, 2 * manifest.view_width, 3), 128, np.uint8)
    return _observation(time, dict.fromkeys(manifest.cameras, picture))


def measure(policy: Policy, *, plans: int = 200, warmup: int = 20, seed: int = 0) -> dict:
    """Plan and reason on noise at 10 Hz of its clock, as fast as it goes; return the report that `bench` writes.

    Pictures come at twice the view size; decoding is measured after each tenth plan.
    """
    if plans < 1 or warmup < 0:
        raise ValueError(f'need plans >= 1 and warmup >= 0, got {plans} and {warmup}')
    m, random = policy.manifest, np.random.default_rng(seed)
    shape = (2 * m.view_height, 2 * m.view_width, 3)
    pictures = [
        {name: random.integers(0, 256, shape, np.uint8) for name in m.cameras} for _ in range(4)
    ]
    policy.reset()
    rows: dict[str, list[float]] = {}
    for index in range(warmup + plans):
        plan = policy.plan(_observation(index / 10, pictures[index % len(pictures)]))
        decoding = _decode_times(policy) if index % 10 == 0 else []
        if index >= warmup:
            for stage, value in plan.timings_ms.items():
                rows.setdefault(stage, []).append(value)
            rows.setdefault('decode', []).extend(decoding)
    stages = {stage: _row(values) for stage, values in rows.items() if values}
    return {
        'bundle': m.name,
        'stages': stages,
        'end_to_end': stages.pop('total'),
        'plans': plans,
        'views': len(plan.views),
        'parity': dict(m.parity),
        'machine': {
            'processor': _processor(),
            'system': platform.platform(),
            'python': platform.python_version(),
        },
        'versions': _versions(),
        'commit': m.commit,
    }


def _decode_times(policy):
    """Return the milliseconds of each token of the text but the first, which comes from the prefill."""
    stamps = [perf_counter() for _ in policy.reason()]
    return (np.diff(stamps) * 1e3).tolist()


def _row(values):
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return {'p50_ms': p50, 'p90_ms': p90, 'p99_ms': p99}


def _observation(time, images):
    guidance = Guidance(
        near=np.array([10.0, 0.0]), far=np.array([25.0, 0.0]), command=Command.FOLLOW
    )
    ego = EgoState(x=0.0, y=0.0, yaw=0.0, speed=5.0)
    return Observation(time=time, images=images, ego=ego, guidance=guidance)


def _processor() -> str:
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            names = [
                line.split(':', 1)[1].strip() for line in file if line.startswith('model name')
            ]
    except OSError:
        names = []
    return f'{len(names)} x {names[0]}' if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

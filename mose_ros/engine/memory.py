"""What a process holds, and whether that grows: a soak of many plans."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from mose_ros.core.process import resident_bytes
from mose_ros.engine.contestants import Engine
from mose_ros.engine.turns import row

MIB = 1 << 20
PAGE = 4096  # bytes: what the system counts memory in
WINDOWS = 100
WARM = 0.2  # share of the windows in which pools fill up
TRACED = 2000  # plans that Python's own allocations are traced in, which slows it down
TEXT_EVERY = 20  # plans


def peak_bytes() -> int:
    """Return the most that the process has ever had in memory."""
    for line in Path('/proc/self/status').read_text(encoding='ascii').splitlines():
        if line.startswith('VmHWM'):
            return int(line.split()[1]) << 10
    raise OSError('/proc/self/status does not say VmHWM')


def soak(
    ours: Engine, plans: int, shown: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Plan that often, with a text now and then, and return how memory and latency went.

    resident: slope in bytes a plan behind the warm-up, by least squares, with the 95 % interval, widened for what follows
    from the window before. traced: bytes by which Python's live allocations grew.
    """
    if plans < WINDOWS:
        raise ValueError(f'soak: {plans} plans are too few; at least {WINDOWS}')
    size = plans // WINDOWS
    # Written to now: a list would grow by 32 bytes a plan, which is not the engine's.
    windows, resident = np.ones((WINDOWS, size)), []
    for index in range(WINDOWS * size):
        windows.flat[index] = ours.plan(index).ms
        if index % TEXT_EVERY == 0:
            _say(ours)
        if (index + 1) % size == 0:
            resident.append(resident_bytes())
            shown(index + 1)
    warm = int(WARM * WINDOWS)
    return {
        'plans': WINDOWS * size,
        'resident': {
            **slope(np.asarray(resident[warm:], np.float64), size, grain=PAGE),
            'first_mib': resident[warm] / MIB,
            'last_mib': resident[-1] / MIB,
            'by_window_mib': [round(one / MIB, 2) for one in resident],
        },
        'traced': _traced(ours, min(plans, TRACED)),
        'end_to_end': row(windows[warm:].ravel()),
        'p50_ms_by_window': np.percentile(windows, 50, axis=1).round(2).tolist(),
        'p99_ms_by_window': np.percentile(windows, 99, axis=1).round(2).tolist(),
    }


def slope(values: np.ndarray, step: float, grain: float = 0.0) -> dict[str, float | bool]:
    """Return the slope of a line through values `step` apart with its 95 % interval; flat: 0 lies within.

    grain: what values are counted in; one of it over the whole line cannot be told from none, so the interval is as much wider.
    """
    place = np.arange(len(values)) * step
    place = place - place.mean()
    centred = values - values.mean()
    rise = float(place @ centred / (place @ place))
    rest = centred - rise * place
    error = np.sqrt(rest @ rest / (len(values) - 2) / (place @ place))
    spread = rest @ rest
    kinship = np.clip(rest[1:] @ rest[:-1] / spread, 0.0, 0.99) if spread > 0 else 0.0
    error = float(1.99 * error * np.sqrt((1 + kinship) / (1 - kinship)))
    error += grain / float(np.ptp(place))
    low, high = rise - error, rise + error
    return {
        'bytes_per_plan': rise,
        'low': low,
        'high': high,
        'flat': bool(low <= 0.0 <= high),
    }


def _say(ours: Engine) -> None:
    for _ in ours.policy.reason():
        pass


def _traced(ours: Engine, plans: int) -> dict[str, float]:
    began = perf_counter()
    tracemalloc.start()
    try:
        for index in range(plans // 4):  # what is kept on purpose is there by now
            ours.plan(index)
        _say(ours)
        before = tracemalloc.get_traced_memory()[0]
        for index in range(plans // 4, plans):
            ours.plan(index)
        _say(ours)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    return {
        'plans': plans - plans // 4,
        'grown_bytes': grown,
        'bytes_per_plan': grown / max(1, plans - plans // 4),
        'seconds': perf_counter() - began,
    }

"""Bundles are timed on the same moments, in turns."""

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')

from mose_ros.core.rig import CAMERAS  # noqa: E402
from mose_ros.training import plan_times  # noqa: E402
from mose_ros.training.moments import fake_moments  # noqa: E402


class Clock:
    """A policy that takes a known time, and the log of all plans."""

    log: list[tuple[str, float]] = []
    now = 0.0

    def __init__(self, folder, threads):
        self.name, self.manifest = folder.name, SimpleNamespace(cameras=CAMERAS, frame_gap=0.4)

    def plan(self, moment):
        self.log.append((self.name, moment.time))
        Clock.now += {'slow': 0.020, 'quick': 0.005}[self.name]


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Return the log of what is planned, on three moments, with a clock that only plans move."""
    Clock.log, Clock.now = [], 0.0
    policy = SimpleNamespace(load=lambda folder, threads: Clock(folder, threads))
    monkeypatch.setattr(plan_times, 'Policy', policy)
    monkeypatch.setattr(plan_times, 'perf_counter', lambda: Clock.now)
    monkeypatch.setattr(plan_times, 'spread', lambda *_: [[tmp_path]])
    monkeypatch.setattr(plan_times, 'recorded_moments', lambda *_: fake_moments(CAMERAS, count=3))
    return Clock


def test_bundles_take_turns_on_the_same_moments(clock, tmp_path):
    bundles = {name: tmp_path / name for name in ('slow', 'quick')}
    found = plan_times.measure(bundles, tmp_path, plans=6, warmup=1)
    assert found.p50_ms == {'slow': 20.0, 'quick': 5.0}
    assert (found.plans, found.moments) == (6, 3)
    assert 'median of 6 plans on 3 recorded moments, the same for all' in str(found)
    slow, quick = ([time for name, time in clock.log if name == one] for one in bundles)
    assert slow == quick == sorted(slow) and len(set(slow)) == 7, 'time never goes back'
    names = [name for name, _ in clock.log]
    assert all(set(names[i : i + 2]) == set(bundles) for i in range(0, 14, 2))
    assert set(names[::2]) == set(bundles), 'nobody always begins'


def test_data_without_these_cameras_is_named(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_times, 'recorded_moments', lambda *_: [])
    with pytest.raises(ValueError, match='has no clip with the cameras front, '):
        plan_times.measure({'slow': Path('slow')}, tmp_path)

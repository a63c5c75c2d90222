"""What the tests of pictures share: opening a renderer, telling classes apart, and a process of its own for code."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip('panda3d', reason='the simulator is an extra: pip install mose_ros[sim]')

from mose_ros.core.types import EgoState
from mose_ros.sim.looks import CLASSES
from mose_ros.sim.renderer import Renderer
from mose_ros.sim.roads import RoadMap

ROOT = Path(__file__).parents[2]
ORIGIN = EgoState(x=0.0, y=0.0, yaw=0.0, speed=0.0)
EMPTY = RoadMap(surfaces=[], paint=[], scenery=[])


def open_renderer(backend, size=(256, 144)):
    """Return a renderer with that back end; skip the test where EGL is missing."""
    try:
        return Renderer(backend=backend, size=size)
    except RuntimeError as error:
        if backend == 'egl':
            pytest.skip(f'this machine has no EGL: {error}')
        raise


def is_class(classes, name):
    """Return where the picture of classes shows that class."""
    return classes == CLASSES.index(name)


def run_code(code, **env):
    """Run code in a process of its own and return what it prints, errors included."""
    path = os.pathsep.join([str(ROOT), str(ROOT / 'test'), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)],
        env={**os.environ, 'PYTHONPATH': path, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr

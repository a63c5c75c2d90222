"""A machine with a GPU and TensorRT, as far as tests can have one."""

import sys

import pytest

from engine.fake_cuda import FakeDriver
from engine.fake_tensorrt import make
from mose_ros.engine import cuda, tensorrt_build

CACHED = (tensorrt_build.load, tensorrt_build.listener, tensorrt_build.runtime, cuda.device)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that sets up a machine: a GPU, a version of TensorRT, faults."""

    def set_up(version='10.3.0', faults=None, **gpu):
        for one in CACHED:
            one.cache_clear()
        driver = FakeDriver(**gpu)
        monkeypatch.setattr(cuda, 'load', lambda: driver)
        trt = make(driver, version=version, faults=faults)
        monkeypatch.setitem(sys.modules, 'tensorrt', trt)
        monkeypatch.setenv('MOSE_ROS_ENGINES', str(tmp_path / 'engines'))
        return driver, trt

    yield set_up
    for one in CACHED:
        one.cache_clear()

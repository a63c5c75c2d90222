"""Every test of this room has a ROS domain of its own that stays on this machine."""

import os

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed: pip install -e ".[ros]"')


@pytest.fixture(scope='session', autouse=True)
def _own_domain():
    from mose_ros.nodes.processes import DomainLock

    lock = DomainLock()
    before = {
        name: os.environ.get(name) for name in ('ROS_DOMAIN_ID', 'ROS_AUTOMATIC_DISCOVERY_RANGE')
    }
    os.environ.update(ROS_DOMAIN_ID=str(lock.number), ROS_AUTOMATIC_DISCOVERY_RANGE='LOCALHOST')
    yield
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    lock.close()


@pytest.fixture
def context():
    """Return a fresh rclpy context."""
    import rclpy

    fresh = rclpy.Context()
    rclpy.init(context=fresh)
    yield fresh
    rclpy.try_shutdown(context=fresh)


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    """Return the folder of a made bundle."""
    from engine.bundles import make_bundle

    return str(make_bundle(tmp_path_factory.mktemp('bundle')))


@pytest.fixture
def graph(context):
    """Return nodes under way, none at first."""
    from nodes.graph import Graph

    made = Graph(context)
    yield made
    made.close()


@pytest.fixture(scope='session')
def vehicle_messages(tmp_path_factory):
    """Make carla_msgs and ackermann_msgs importable: the installed ones, or those that can be built here."""
    import importlib
    import sys

    from nodes.interfaces import NotBuildable, build

    folder = tmp_path_factory.mktemp('interfaces')
    try:
        build(folder)
    except NotBuildable as error:
        pytest.skip(
            f'carla_msgs and ackermann_msgs are not installed and can not be built: {error}'
        )
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    return folder

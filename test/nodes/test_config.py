"""Each parameters file loads into each node's declared parameters, and CARLA's files are what the rig says."""

import json
from pathlib import Path

import pytest
import rclpy
import yaml
from rclpy.node import Node

from mose_ros.core.carla import LINCOLN, WHEEL_ANGLE
from mose_ros.nodes import (
    bag_node,
    carla_objects,
    carla_state_node,
    controller_node,
    driver_node,
    replay_node,
    simulator_node,
    view_router_node,
)
from mose_ros.nodes.parameters import declare

ROOT = Path(__file__).parents[2]
KINDS = {
    'view_router': view_router_node.ViewRouterParameters,
    'driver': driver_node.DriverParameters,
    'controller': controller_node.ControllerParameters,
    'simulator': simulator_node.SimulatorParameters,
    'carla_state': carla_state_node.CarlaStateParameters,
    'replay': replay_node.ReplayParameters,
    'bag': bag_node.BagParameters,
}
FILES = sorted(
    path for path in (ROOT / 'config').glob('*.yaml') if not path.name.startswith('skills')
)


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize('name', KINDS)
def test_every_file_fits_every_node(path, name):
    context = rclpy.Context()
    rclpy.init(args=['--ros-args', '--params-file', str(path)], context=context)
    node = Node(name, context=context, namespace='/mose')
    try:
        read = declare(node, KINDS[name])
    finally:
        node.destroy_node()
        rclpy.try_shutdown(context=context)
    sections = yaml.safe_load(path.read_text())
    assert {section.rpartition('/')[2] for section in sections} <= KINDS.keys()
    for key, value in sections.get(f'/**/{name}', {}).get('ros__parameters', {}).items():
        assert getattr(read, key) == (tuple(value) if isinstance(value, list) else value)


# ---- CARLA's files ----


@pytest.mark.parametrize('name', ['carla_bridge', 'carla_native', 'leaderboard'])
def test_carlas_controllers_know_carlas_vehicle(name):
    sections = yaml.safe_load((ROOT / f'config/{name}.yaml').read_text())
    settings = sections['/**/controller']['ros__parameters']
    for field in ('wheelbase', 'rear_axle', 'max_steer', 'throttle_gain', 'brake_gain'):
        assert settings[field] == getattr(LINCOLN, field)
    assert settings['hold_brake'] == LINCOLN.hold_brake
    assert settings['wheel_angle'] == WHEEL_ANGLE


def test_objects_json_is_what_the_command_prints(capsys):
    assert carla_objects.main([]) == 0
    assert capsys.readouterr().out == (ROOT / 'config/carla/objects.json').read_text()
    assert carla_objects.main(['--role', 'hero', '--width', '800', '--height', '450']) == 0
    other = capsys.readouterr().out
    assert '"id": "hero"' in other and '"image_size_x": 800' in other
    assert carla_objects.main(['--height', '0']) == 1
    assert '1600x0' in capsys.readouterr().err


def test_the_bridges_cameras_are_those_that_the_view_router_hears():
    [ego] = json.loads((ROOT / 'config/carla/objects.json').read_text())['objects']
    cameras = {one['id'] for one in ego['sensors'] if one['type'] == 'sensor.camera.rgb'}
    settings = yaml.safe_load((ROOT / 'config/carla_bridge.yaml').read_text())
    topic = settings['/**/view_router']['ros__parameters']['camera_topic']
    names = view_router_node.ViewRouterParameters().cameras
    heard = {topic.format(camera=name).split('/')[3] for name in names}
    assert heard == cameras and topic.split('/')[2] == ego['id']

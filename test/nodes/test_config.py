"""Each parameters file loads into each node's declared parameters, and the launch file uses each argument that it declares."""

import ast
import json
import sys
import types
from pathlib import Path

import pytest
import rclpy
import yaml
from rclpy.node import Node

from mose_ros.core.carla import LINCOLN, WHEEL_ANGLE
from mose_ros.nodes import (
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


# ---- the launch file ----


USED_OF_LAUNCH = ['LaunchDescription', 'DeclareLaunchArgument', 'OpaqueFunction']
USED_OF_LAUNCH += ['SetEnvironmentVariable', 'LaunchConfiguration', 'Node']


class StandIn:
    """Takes the place of an action or substitution of launch where that is not installed: keeps what it was given."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs

    def perform(self, context):
        return context[self.args[0]]


def load_launch_file(monkeypatch):
    try:
        import launch
        import launch_ros  # noqa: F401

        is_real = hasattr(launch, 'LaunchDescription')
    except ImportError:
        is_real = False
    if not is_real:
        for name in [
            'launch',
            'launch.actions',
            'launch.substitutions',
            'launch_ros',
            'launch_ros.actions',
        ]:
            module = types.ModuleType(name)
            for one in USED_OF_LAUNCH:
                setattr(module, one, StandIn)
            monkeypatch.setitem(sys.modules, name, module)
    module = types.ModuleType('drive_launch')
    exec(
        compile((ROOT / 'launch/drive.launch.py').read_text(), 'drive.launch.py', 'exec'),
        module.__dict__,
    )
    module.get_package_share_directory = lambda name: str(ROOT)
    return module, is_real


def test_every_argument_is_declared_described_and_used(monkeypatch):
    module, _ = load_launch_file(monkeypatch)
    tree = ast.parse((ROOT / 'launch/drive.launch.py').read_text())
    used = {
        node.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and getattr(node.value, 'id', '') == 'given'
    }
    assert used == set(module.ARGUMENTS)
    assert all(len(text) > 10 for _, _, text in module.ARGUMENTS.values())
    module.generate_launch_description()


PLATFORMS = ['sim', 'carla_bridge', 'carla_native', 'leaderboard', 'vehicle', 'bag']
EXTRA = {  # beside view_router, driver and controller
    'sim': {'simulator'},
    'carla_native': {'carla_state'},
    'leaderboard': {'carla_state'},
}


@pytest.mark.parametrize('platform', PLATFORMS)
def test_each_platform_starts_its_nodes_with_files_that_exist(monkeypatch, platform):
    module, is_real = load_launch_file(monkeypatch)
    if is_real:
        from launch import LaunchContext

        context = LaunchContext()
        given = {name: default for name, (default, _, _) in module.ARGUMENTS.items()}
        context.launch_configurations.update({**given, 'platform': platform})
        nodes = [action for action in module.start(context) if hasattr(action, 'node_package')]
        assert len(nodes) == 3 + len(EXTRA.get(platform, ()))
        return
    given = {name: default for name, (default, _, _) in module.ARGUMENTS.items()}
    actions = module.start({**given, 'platform': platform})
    nodes = {one.kwargs['name']: one.kwargs for one in actions if 'package' in one.kwargs}
    assert nodes.keys() == {'view_router', 'driver', 'controller'} | EXTRA.get(platform, set())
    for name, node in nodes.items():
        *files, own = node['parameters']
        assert all(Path(file).is_file() for file in files)
        known = {*KINDS[name].__dataclass_fields__, 'use_sim_time'}
        assert own.keys() <= known
        assert own['use_sim_time'] == (platform not in ('sim', 'vehicle'))


@pytest.mark.parametrize('platform', ['carla_bridge', 'carla_native', 'leaderboard'])
def test_another_role_reaches_topics_frames_and_nodes(monkeypatch, platform):
    module, is_real = load_launch_file(monkeypatch)
    if is_real:
        pytest.skip('launch is installed: its nodes hide their parameters')
    given = {name: default for name, (default, _, _) in module.ARGUMENTS.items()}
    actions = module.start({**given, 'platform': platform, 'role_name': 'car7'})
    nodes = {one.kwargs['name']: one.kwargs for one in actions if 'package' in one.kwargs}
    for name, node in nodes.items():
        own, remapped = node['parameters'][-1], dict(node['remappings'])
        assert 'car7' in str(own)
        assert remapped['odometry'] == '/carla/car7/odometry'
        assert name != 'view_router' or own['camera_topic'] == '/carla/car7/rgb_{camera}/image'


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

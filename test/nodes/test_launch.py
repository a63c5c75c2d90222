"""The launch file: with look-alikes that take no wrong keyword where launch is not installed, and for real where it is."""

import ast
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from std_msgs.msg import Header

from mose_ros.engine.session import BACKENDS as INFERENCE
from mose_ros.nodes.network import NetworkParameters
from mose_ros.nodes.vehicle_command import BACKENDS
from nodes.graph import Ear
from nodes.test_config import KINDS

ROOT = Path(__file__).parents[2]
FILE = ROOT / 'launch/drive.launch.py'
PLATFORMS = ['sim', 'carla_bridge', 'carla_native', 'leaderboard', 'vehicle', 'bag']
EXTRA = {  # beside view_router, driver and controller
    'sim': {'simulator'},
    'carla_native': {'carla_state'},
    'leaderboard': {'carla_state'},
}
IS_INSTALLED = all(
    importlib.util.find_spec(name) and importlib.util.find_spec(name).origin
    for name in ('launch', 'launch_ros')
)


class Kept:
    """An action that keeps what it was given."""

    def __init__(self, **given):
        self.__dict__.update(given)


# What these of launch and launch_ros take in Humble, as far as a launch file should use it: another keyword is a TypeError.


class LaunchDescription(Kept):
    def __init__(self, entities):
        super().__init__(entities=entities)


class DeclareLaunchArgument(Kept):
    def __init__(self, name, *, default_value=None, description=None, choices=None):
        assert not choices or default_value in choices
        super().__init__(name=name, default_value=default_value, description=description)


class OpaqueFunction(Kept):
    def __init__(self, *, function):
        super().__init__(function=function)


class SetEnvironmentVariable(Kept):
    def __init__(self, name, value):
        super().__init__(name=name, value=value)


class ExecuteProcess(Kept):
    def __init__(self, *, cmd, output='log', additional_env=None):
        assert all(isinstance(word, str) for word in cmd)
        super().__init__(cmd=cmd, additional_env=additional_env)


class Node(Kept):
    def __init__(
        self,
        *,
        executable,
        package,
        name=None,
        namespace=None,
        parameters=(),
        remappings=(),
        ros_arguments=(),
        arguments=(),
        output='log',
        additional_env=None,
        sigterm_timeout='5',
        respawn=False,
        respawn_delay=0.0,
    ):
        given = locals()
        super().__init__(**{key: given[key] for key in given.keys() - {'self', '__class__'}})


class LaunchConfiguration(Kept):
    def __init__(self, name):
        super().__init__(name=name)

    def perform(self, context):
        return context[self.name]


HOME_OF = {
    'launch': [LaunchDescription],
    'launch.actions': [
        DeclareLaunchArgument,
        OpaqueFunction,
        SetEnvironmentVariable,
        ExecuteProcess,
    ],
    'launch.substitutions': [LaunchConfiguration],
    'launch_ros': [],
    'launch_ros.actions': [Node],
}


@pytest.fixture
def drive(monkeypatch):
    """Return the launch file's module, loaded with look-alikes."""
    for name, kinds in HOME_OF.items():
        module = types.ModuleType(name)
        module.__dict__.update({kind.__name__: kind for kind in kinds})
        monkeypatch.setitem(sys.modules, name, module)
    for name in ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE'):
        monkeypatch.delenv(name, raising=False)
    module = types.ModuleType('drive_launch')
    exec(compile(FILE.read_text(), str(FILE), 'exec'), module.__dict__)
    module.get_package_share_directory = lambda name: str(ROOT)
    module.get_package_prefix = lambda name: '/prefix'
    return module


def actions(drive, **given):
    """Return what starts for these arguments."""
    defaults = {name: default for name, (default, _, _) in drive.ARGUMENTS.items()}
    assert given.keys() <= defaults.keys()
    return drive.start({**defaults, **given})


def nodes(drive, **given):
    """Return the nodes of mose_ros among them, by name."""
    found = [one for one in actions(drive, **given) if isinstance(one, Node)]
    return {one.name: one for one in found if one.package == 'mose_ros'}


def test_every_argument_is_declared_described_and_used(drive):
    used = {
        node.slice.value
        for node in ast.walk(ast.parse(FILE.read_text()))
        if isinstance(node, ast.Subscript)
        and getattr(node.value, 'id', '') == 'given'
        and isinstance(node.slice, ast.Constant)
    }
    others = {
        'odometry',
        'route',
        'backend',
        'precision',
        'control_backend',
        'command_topic',
        'bundle',
    }  # asked for by a variable
    assert used | others == set(drive.ARGUMENTS)
    for name, (default, _, text) in drive.ARGUMENTS.items():
        assert len(text) > 15 and (default or 'empty: ' in text), name
    assert [one.name for one in drive.generate_launch_description().entities[:-1]] == list(
        drive.ARGUMENTS
    )


def test_choices_are_those_of_the_nodes(drive):
    choices = {name: choices for name, (_, choices, _) in drive.ARGUMENTS.items()}
    assert choices['platform'] == PLATFORMS
    assert choices['backend'] == ['', *INFERENCE]
    assert choices['control_backend'] == ['', *BACKENDS]
    fields = NetworkParameters.__dataclass_fields__
    assert {*fields['precision'].metadata['choices']} <= {*choices['precision']}


@pytest.mark.parametrize('platform', PLATFORMS)
def test_each_platform_starts_its_nodes_with_files_and_parameters_that_exist(drive, platform):
    found = nodes(drive, platform=platform)
    assert found.keys() == {'view_router', 'driver', 'controller'} | EXTRA.get(platform, set())
    for name, node in found.items():
        *files, own = node.parameters
        assert all(Path(file).is_file() for file in files)
        assert own.keys() <= {*KINDS[name].__dataclass_fields__, 'use_sim_time'}
        assert own['use_sim_time'] == (platform not in ('sim', 'vehicle'))
        assert node.respawn == (name != 'simulator' and platform not in ('sim', 'bag'))
    assert not nodes(drive, platform='vehicle', use_respawn='false')['driver'].respawn
    assert nodes(drive, platform='sim', use_sim_time='true')['driver'].parameters[-1][
        'use_sim_time'
    ]


@pytest.mark.parametrize('platform', ['carla_bridge', 'carla_native', 'leaderboard'])
def test_another_role_reaches_topics_frames_and_nodes(drive, platform):
    for name, node in nodes(drive, platform=platform, role_name='car7').items():
        own, remapped = node.parameters[-1], dict(node.remappings)
        assert 'car7' in str(own)
        assert remapped['odometry'] == '/carla/car7/odometry'
        assert name != 'view_router' or own['camera_topic'] == '/carla/car7/rgb_{camera}/image'


def test_arguments_reach_the_nodes(drive, tmp_path, monkeypatch):
    monkeypatch.setenv('ROS_SECURITY_KEYSTORE', str(tmp_path))
    mine = tmp_path / 'mine.yaml'
    mine.write_text('/**/driver:\n  ros__parameters: {reasoning: false}\n')
    given = {
        'platform': 'vehicle',
        'cameras': 'front=/cam0/image,back=/cam1/image',
        'control_backend': 'twist',
        'command_topic': '/dbw/cmd',
        'odometry': '/odom',
        'precision': 'float32',
        'params_file': str(mine),
        'enclave': '/mose/',
        'log_level': 'debug',
        'autostart': 'false',
    }
    found = nodes(drive, **given)
    router, controller = found['view_router'], found['controller']
    assert router.parameters[-1]['cameras'] == ['front', 'back']
    assert router.parameters[-1]['camera_topics'] == ['/cam0/image', '/cam1/image']
    assert router.parameters[-1]['precision'] == 'float32'
    assert router.parameters[1] == str(mine) and not router.parameters[-1]['autostart']
    assert controller.parameters[-1]['control_backend'] == 'twist'
    assert controller.parameters[-1]['command_topic'] == '/dbw/cmd'
    assert dict(router.remappings) == {'odometry': '/odom', 'route': 'route'}
    assert router.ros_arguments == ['--log-level', 'debug', '--enclave', '/mose/view_router']
    variables = {
        one.name: one.value
        for one in actions(drive, **given)
        if isinstance(one, SetEnvironmentVariable)
    }
    assert variables['ROS_SECURITY_STRATEGY'] == 'Enforce'
    plain = nodes(drive, platform='vehicle')
    assert plain['controller'].parameters[-1].keys() == {'use_sim_time'}
    assert plain['driver'].parameters[-1].keys() == {'use_sim_time'}
    assert plain['driver'].ros_arguments == ['--log-level', 'info']


def test_what_a_file_says_stays_unless_an_argument_says_otherwise(drive, tmp_path):
    file = tmp_path / 'mine.yaml'
    values = 'bundle: /mine, backend: tensorrt, precision: float16, autostart: false'
    file.write_text(f'/**/driver:\n  ros__parameters: {{{values}}}\n')
    given = {'platform': 'vehicle', 'params_file': str(file)}
    own = nodes(drive, **given)['driver'].parameters[-1]
    assert own == {'use_sim_time': False}
    own = nodes(drive, **given, bundle='/other', backend='auto')['driver'].parameters[-1]
    assert own == {'use_sim_time': False, 'bundle': '/other', 'backend': 'auto'}


@pytest.mark.parametrize(
    ('given', 'words'),
    [
        ({'cameras': 'front=/a,back'}, 'every one with its topic'),
        ({'cameras': 'front,,back'}, 'give names'),
        ({'params_file': 'nowhere.yaml'}, 'params_file:=nowhere.yaml is no file'),
        ({'fastdds_profile': 'nowhere.xml'}, 'fastdds_profile:=nowhere.xml is no file'),
        ({'platform': 'bag', 'bag': 'nowhere'}, 'bag:=nowhere does not exist'),
        ({'enclave': 'mose'}, 'begins with a slash'),
        ({'enclave': '/mose', 'KEYS': ''}, 'ROS_SECURITY_KEYSTORE'),
        ({'enclave': '/mose', 'platform': 'leaderboard'}, 'no keys, for carla_state'),
    ],
)
def test_arguments_that_can_not_be_are_named(drive, monkeypatch, tmp_path, given, words):
    monkeypatch.setenv('ROS_SECURITY_KEYSTORE', str(tmp_path))
    if given.pop('KEYS', None) is not None:
        monkeypatch.delenv('ROS_SECURITY_KEYSTORE')
    with pytest.raises(RuntimeError, match=re.escape(words)):
        actions(drive, **given)


def test_the_profile_of_shared_memory_is_set_unless_the_user_has_one(drive, monkeypatch):
    def profiles(**given):
        found = actions(drive, **given)
        return {one.name: one.value for one in found if isinstance(one, SetEnvironmentVariable)}

    shared = str(ROOT / 'config/fastdds_shm.xml')
    monkeypatch.setenv('ROS_DISTRO', 'kilted')
    assert profiles() == {'FASTDDS_DEFAULT_PROFILES_FILE': shared}
    assert profiles(fastdds_profile='none') == {}
    monkeypatch.setenv('ROS_DISTRO', 'jazzy')
    assert profiles() == {'FASTRTPS_DEFAULT_PROFILES_FILE': shared}
    monkeypatch.delenv('ROS_DISTRO')
    monkeypatch.setenv('FASTDDS_DEFAULT_PROFILES_FILE', 'mine.xml')
    assert profiles() == {}
    assert profiles(fastdds_profile=shared)['FASTDDS_DEFAULT_PROFILES_FILE'] == shared


def test_a_played_bag_sends_its_pictures_with_a_larger_segment(drive, tmp_path):
    found = nodes(drive, platform='bag', bag=str(tmp_path), bag_start='2', cameras='front=/a')
    player = found['bag']
    assert player.additional_env['FASTDDS_DEFAULT_PROFILES_FILE'].endswith('fastdds_cameras.xml')
    assert found['driver'].additional_env is None and not player.respawn
    own = player.parameters[-1]
    assert own['bag'] == str(tmp_path) and own['start_s'] == 2.0
    assert own['cameras'] == ['front'] and own['camera_topics'] == ['/a']
    assert own.keys() <= {*KINDS['bag'].__dataclass_fields__, 'use_sim_time'}


def test_a_bag_of_carla_is_played_on_carlas_topics(drive, tmp_path):
    config = str(ROOT / 'config/carla_bridge.yaml')
    found = nodes(drive, platform='bag', bag=str(tmp_path), params_file=config)
    assert found['bag'].parameters[-1]['camera_topic'] == '/carla/ego_vehicle/rgb_{camera}/image'
    plain = nodes(drive, platform='bag', bag=str(tmp_path))['bag'].parameters[-1]
    assert plain['camera_topic'] == 'camera/{camera}/image_raw/compressed'


def test_build_only_builds_where_the_nodes_will_look_and_drives_nothing(drive, tmp_path):
    [one] = actions(drive, build_only='true', bundle='/my/bundle', backend='tensorrt')
    engine = '/prefix/lib/mose_ros/engine'
    assert one.cmd == [engine, 'build', '/my/bundle', '--backend', 'tensorrt']
    orin = {'platform': 'vehicle', 'params_file': str(ROOT / 'config/vehicle_orin.yaml')}
    [one] = actions(drive, build_only='true', **orin)
    bundle = str(ROOT / 'models/mose-tiny')
    engines = ['--engines', '/var/cache/mose_ros']
    assert one.cmd == [engine, 'build', bundle, '--backend', 'auto', *engines]
    mine = tmp_path / 'mine.yaml'
    text = '/**/driver:\n  ros__parameters: {bundle: /mine}\ndriver: {ros__parameters: {bundle: /no}}\n'
    mine.write_text(text)  # the second speaks of a node without namespace
    both = actions(drive, build_only='true', platform='vehicle', params_file=str(mine))
    assert [one.cmd[2] for one in both] == [bundle, '/mine']


# ---- what is recorded ----


def recorded(drive, topic, **given):
    """Say whether the recorder would record a topic."""
    [one] = [one for one in actions(drive, record='true', **given) if hasattr(one, 'cmd')]
    pattern = one.cmd[one.cmd.index('--regex') + 1]
    return re.search(pattern, topic) is not None


@pytest.mark.parametrize('topic', ['/mose/trajectory', '/mose/driver/heartbeat', '/diagnostics'])
def test_what_the_nodes_say_is_recorded(drive, topic):
    assert recorded(drive, topic, platform='vehicle')


def test_what_the_nodes_hear_is_recorded_wherever_it_is(drive):
    bridge = {'platform': 'carla_bridge', 'role_name': 'car7'}
    for topic in ('rgb_front/image', 'rgb_back_left/image', 'odometry', 'waypoints', 'twist'):
        assert recorded(drive, f'/carla/car7/{topic}', **bridge)
    for topic in ('depth/image', 'rgb_front/camera_info', 'lidar'):  # not heard
        assert not recorded(drive, f'/carla/car7/{topic}', **bridge)
    vehicle = {'platform': 'vehicle', 'odometry': '/odom', 'cameras': 'front=/cam0/image'}
    assert recorded(drive, '/odom', **vehicle) and recorded(drive, '/cam0/image', **vehicle)
    assert recorded(drive, '/carla/ego_vehicle/ackermann_cmd', **vehicle)
    assert recorded(drive, '/dbw/cmd', **vehicle, command_topic='/dbw/cmd')
    assert not recorded(drive, '/dbw/cmd', **vehicle)
    assert recorded(drive, '/mose/camera/front/image_raw/compressed', platform='vehicle')
    assert not recorded(drive, '/cam1/image', **vehicle)
    assert not recorded(drive, '/clock', **bridge)  # a player makes its own


def test_the_recorder_stamps_with_the_nodes_clock(drive, tmp_path):
    folder = str(tmp_path / 'bag')
    bridge, vehicle = (
        next(
            one for one in actions(drive, record=folder, platform=platform) if hasattr(one, 'cmd')
        )
        for platform in ('carla_bridge', 'vehicle')
    )
    assert bridge.cmd[-3:] == ['--output', folder, '--use-sim-time']
    assert vehicle.cmd[-2:] == ['--output', folder]


def test_the_recorder_and_rviz_are_let_in_where_security_is_enforced(drive, monkeypatch, tmp_path):
    monkeypatch.setenv('ROS_SECURITY_KEYSTORE', str(tmp_path))
    given = {'platform': 'vehicle', 'record': 'true', 'rviz': 'true'}
    *_, rviz, bag = actions(drive, **given, enclave='/mose')
    assert rviz.ros_arguments == ['--enclave', '/mose/operator']
    assert bag.additional_env == {'ROS_SECURITY_ENCLAVE_OVERRIDE': '/mose/operator'}
    *_, rviz, bag = actions(drive, **given)
    assert not rviz.ros_arguments and not bag.additional_env


# ---- RViz ----


def test_rviz_shows_what_there_is(drive):
    import yaml

    found = actions(drive, platform='carla_bridge', rviz='true', namespace='car')
    [rviz] = [one for one in found if isinstance(one, Node) and one.package == 'rviz2']
    path = Path(rviz.arguments[1])
    text = path.read_text()
    path.unlink()
    shown = yaml.safe_load(text)['Visualization Manager']
    topics = {one['Topic']['Value'] for one in shown['Displays'] if 'Topic' in one}
    ours = {f'/car/{name}' for name in ('markers', 'path', 'views')}
    assert topics == ours | {'/carla/ego_vehicle/waypoints', '/carla/ego_vehicle/odometry'}
    assert shown['Global Options']['Fixed Frame'] == 'ego_vehicle'
    assert '@' not in text.partition('Panels')[2]


# ---- for real ----


@pytest.fixture
def prefix(tmp_path):
    """Return the environment of an installation whose files are this checkout's."""
    if not (IS_INSTALLED and shutil.which('ros2')):
        pytest.skip('launch, launch_ros and the command ros2 are not installed: no wheels of them')
    share, lib = tmp_path / 'share/mose_ros', tmp_path / 'lib/mose_ros'
    index = tmp_path / 'share/ament_index/resource_index/packages'
    for folder in (share, lib, index):
        folder.mkdir(parents=True)
    (index / 'mose_ros').touch()
    shutil.copytree(FILE.parent, share / 'launch')  # `ros2 launch` follows no links
    for name in ('config', 'models', 'package.xml'):
        (share / name).symlink_to(ROOT / name)
    for name, module in re.findall(r"'(\w+) = ([\w.]+):main'", (ROOT / 'setup.py').read_text()):
        script = lib / name
        script.write_text(
            f'#!{sys.executable}\nimport sys\nfrom {module} import main\nsys.exit(main())\n'
        )
        script.chmod(0o755)
    known = os.environ.get('AMENT_PREFIX_PATH', '')
    return {**os.environ, 'AMENT_PREFIX_PATH': f'{tmp_path}:{known}'.rstrip(':')}


def test_show_args_tells_every_argument(prefix, drive):
    command = ['ros2', 'launch', 'mose_ros', 'drive.launch.py', '--show-args']
    told = subprocess.run(command, env=prefix, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    for name, (default, choices, _) in drive.ARGUMENTS.items():
        assert f"'{name}':" in told.stdout and f"(default: '{default}')" in told.stdout
        assert all(one in told.stdout for one in choices or [])


def test_a_launched_car_comes_alive_a_killed_node_comes_back_and_nothing_is_left(
    prefix, graph, bundle, tmp_path
):
    names = ('view_router', 'driver', 'controller')
    ear = graph.spin(Ear(graph.context, **{f'{name}/heartbeat': Header for name in names}))
    command = ['ros2', 'launch', 'mose_ros', 'drive.launch.py', 'platform:=vehicle']
    command += [f'bundle:={bundle}', 'control_backend:=twist', 'cameras:=front=/a,back=/b']
    with open(tmp_path / 'log', 'w') as log:
        running = subprocess.Popen(command, env=prefix, stdout=log, stderr=log)
    try:
        for name in names:
            ear.wait(f'{name}/heartbeat', is_active, timeout=60.0)
        driver = process(running.pid, 'driver')
        os.kill(driver, signal.SIGKILL)
        killed = time.monotonic()
        ear.wait('driver/heartbeat', is_active, since=killed + 0.5, timeout=60.0)
        assert process(running.pid, 'driver') != driver
        alive = [process(running.pid, name) for name in names]
    finally:
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 0, (tmp_path / 'log').read_text()
    assert not any(os.path.exists(f'/proc/{pid}') for pid in alive)
    text = (tmp_path / 'log').read_text()
    assert 'Traceback' not in text and 'XMLPARSER' not in text, text


def is_active(msg):
    return msg.frame_id == 'active'


def process(parent, name):
    """Return the child that runs an executable of ours."""
    import psutil

    running = psutil.Process(parent).children(recursive=True)
    [found] = [one.pid for one in running if any(f'mose_ros/{name}' in x for x in one.cmdline())]
    return found

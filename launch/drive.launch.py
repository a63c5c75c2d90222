"""Start the vehicle's nodes on a machine with ROS: ros2 launch mose_ros drive.launch.py --show-args

Plain launch and launch_ros, as Humble has them. Arguments override `params_file`, which overrides config/<platform>.yaml; an
empty one leaves it as it is.
"""

import os
import re
import tempfile
from pathlib import Path

import yaml
from ament_index_python.packages import get_package_prefix, get_package_share_directory
from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    OpaqueFunction,
    SetEnvironmentVariable,
)
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from mose_ros.nodes.files import speaks_of

PLATFORMS = {  # platform: where odometry and route come from, whether time is simulated, the role of the vehicle
    'sim': ('/carla/{role}/odometry', '/carla/{role}/waypoints', False, 'ego_vehicle'),
    'carla_bridge': ('/carla/{role}/odometry', '/carla/{role}/waypoints', True, 'ego_vehicle'),
    'carla_native': ('/carla/{role}/odometry', '/carla/{role}/global_plan', True, 'hero'),
    'leaderboard': ('/carla/{role}/odometry', '/carla/{role}/route', True, 'hero'),
    'vehicle': ('odometry', 'route', False, ''),
    'bag': ('odometry', 'route', True, ''),
}
NETWORKS = ('view_router', 'driver')  # nodes that run the bundle
PROFILES_FILE = ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE')
YES_NO, AUTO_YES_NO = ['true', 'false'], ['auto', 'true', 'false']
CONTROL = ['', 'sim', 'auto', 'carla', 'ackermann', 'ackermann_stamped', 'twist']
ARGUMENTS = {  # name: default, choices, description
    'platform': (
        'sim',
        list(PLATFORMS),
        'what drives: our own simulator, CARLA over ros-bridge, CARLA over its native ROS 2, an agent of the '
        'Leaderboard, a vehicle, or a recorded bag. Each has its config/<platform>.yaml (sim: drive.yaml)',
    ),
    'namespace': ('mose', None, 'namespace of our nodes and of all relative topics'),
    'use_sim_time': (
        'auto',
        AUTO_YES_NO,
        'take the time from /clock; auto: true for CARLA and bags, false for sim and vehicle',
    ),
    'params_file': (
        '',
        None,
        'YAML file with ROS parameters that override config/<platform>.yaml; empty: none',
    ),
    'bundle': (
        '',
        None,
        'folder of the exported network; empty: as `params_file` says, else models/mose-tiny, which this package ships',
    ),
    'backend': (
        '',
        ['', 'auto', 'onnxruntime', 'tensorrt'],
        'what runs the network; auto: TensorRT where it and a GPU are there, else ONNX Runtime; empty: as '
        '`params_file` says, else auto',
    ),
    'precision': (
        '',
        ['', 'auto', 'float32', 'float16', 'int8', 'int4'],
        'precision that the bundle must have, else the nodes refuse it: it is chosen when the network is '
        'exported; auto: whatever the bundle has; empty: as `params_file` says, else auto',
    ),
    'build_only': (
        'false',
        YES_NO,
        "build the bundle's TensorRT engines, which takes minutes and is kept, and end; nothing drives",
    ),
    'role_name': (
        '',
        None,
        'role of the vehicle in CARLA, part of its topics; empty: hero for carla_native and leaderboard, else ego_vehicle',
    ),
    'cameras': (
        '',
        None,
        "cameras that there are, as 'front,back'; with topics of their own as 'front=/cam0/image,back=/cam1/image'; "
        'empty: the six of the rig, on the topics of config/<platform>.yaml',
    ),
    'odometry': ('', None, "topic of the vehicle's nav_msgs/Odometry; empty: as the platform"),
    'route': ('', None, 'topic of the nav_msgs/Path to follow; empty: as the platform'),
    'control_backend': (
        '',
        CONTROL,
        'in whose words the vehicle is commanded; auto: carla_msgs where installed, else ackermann_msgs, else a '
        'Twist; empty: as config/<platform>.yaml says',
    ),
    'command_topic': (
        '',
        None,
        "topic of the commands; empty: as `params_file` says, else the backend's own, which docs/vehicle.md tells",
    ),
    'autostart': (
        '',
        ['', *YES_NO],
        'configure and activate the nodes at once; false: a lifecycle manager of yours does, or `ros2 lifecycle set`; '
        'empty: as `params_file` says, else true',
    ),
    'use_respawn': (
        'auto',
        AUTO_YES_NO,
        'start a node again, after a second, when its process ends; auto: true for CARLA and vehicle, else false',
    ),
    'log_level': ('info', ['debug', 'info', 'warn', 'error', 'fatal'], 'what the nodes log'),
    'rviz': ('false', YES_NO, 'start rviz2 with config/mose.rviz'),
    'record': (
        'false',
        None,
        'true, or the folder of a new bag: record with `ros2 bag` what the nodes hear and say',
    ),
    'bag': (
        '',
        None,
        'platform bag: the recording, which is then played as soon as the nodes are ready; empty: you play it '
        '(docs/interfaces.md says how)',
    ),
    'bag_start': ('0.0', None, 'platform bag: seconds of the recording to leave out'),
    'bag_rate': ('1.0', None, 'platform bag: how many times as fast as it was recorded'),
    'enclave': (
        '',
        None,
        'SROS2 enclave, as /mose: each node then has <enclave>/<node>, and security is enforced with the keys '
        'of ROS_SECURITY_KEYSTORE; empty: no security',
    ),
    'fastdds_profile': (
        'auto',
        None,
        'XML profile of Fast DDS for the nodes; auto: config/fastdds_shm.xml, with shared memory for large '
        "pictures, unless one is set in the environment; none: Fast DDS's own transports",
    ),
    'family': ('normal', None, 'platform sim: scenario family, as `make drive` knows them'),
    'seed': ('1', None, 'platform sim: same seed, same episode'),
}


def generate_launch_description():
    """Declare the arguments; what depends on their values is decided in `start`."""
    declared = [
        DeclareLaunchArgument(
            name,
            default_value=default,
            description=text,
            **({'choices': choices} if choices else {}),
        )
        for name, (default, choices, text) in ARGUMENTS.items()
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=start)])


def start(context):
    """Return the actions for the values of the arguments; RuntimeError names one that can't be."""
    given = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    share = Path(get_package_share_directory('mose_ros'))
    platform = given['platform']
    files = [str(share / 'config' / ('drive.yaml' if platform == 'sim' else f'{platform}.yaml'))]
    if given['params_file']:
        files.append(_file('params_file', given['params_file']))
    if given['build_only'] == 'true':
        return _builders(given, files, share)
    *sources, has_clock, usual = PLATFORMS[platform]
    role = given['role_name'] or usual
    topics = {
        name: given[name] or source.format(role=role)
        for name, source in zip(('odometry', 'route'), sources, strict=True)
    }
    is_simulated = _is_yes(given['use_sim_time'], has_clock)
    own = _parameters(given, role, usual)
    _check_enclave(given, own)
    if platform == 'bag' and given['bag']:
        own['bag'] = _player(given, files, own['view_router'])
    actions = _environment(given, share)
    for name, parameters in own.items():
        common = {'use_sim_time': is_simulated}
        if given['autostart']:
            common['autostart'] = given['autostart'] == 'true'
        actions.append(_node(given, share, name, [*files, {**common, **parameters}], topics))
    if given['rviz'] == 'true':
        base = own['driver'].get('base_frame') or _setting(given, files, 'driver', 'base_frame')
        actions.append(_rviz(given, share, topics, base, is_simulated))
    if given['record'] != 'false':
        cameras = {
            name: _of_router(given, own, files, name) for name in ('camera_topics', 'camera_topic')
        }
        heard = cameras['camera_topics'] or [cameras['camera_topic']]
        said = _commands(given, own['controller'], files)
        actions.append(_record(given, [*heard, *topics.values(), *said], is_simulated))
    return actions


def _node(given, share, name, parameters, topics):
    """Return one of our nodes."""
    arguments = ['--log-level', given['log_level']]
    if given['enclave']:
        arguments += ['--enclave', f'{given["enclave"].rstrip("/")}/{name}']
    is_source = name in ('simulator', 'bag')  # begins anew, so is not started again
    usual = given['platform'] not in ('sim', 'bag')
    return Node(
        package='mose_ros',
        executable=name,
        name=name,
        namespace=given['namespace'],
        output='screen',
        parameters=parameters,
        remappings=list(topics.items()),
        ros_arguments=arguments,
        additional_env=_sends_pictures(given, share) if name == 'bag' else None,
        respawn=not is_source and _is_yes(given['use_respawn'], usual),
        respawn_delay=1.0,
        sigterm_timeout='15',  # s to leave in order, on a busy machine too
    )


def _parameters(given, role, usual):
    """Return which nodes there are, and of each the parameters that the arguments say."""
    platform = given['platform']
    network = {name: given[name] for name in ('bundle', 'backend', 'precision') if given[name]}
    own = {'view_router': dict(network), 'driver': dict(network), 'controller': {}}
    if platform == 'sim':
        own['simulator'] = {'family': given['family'], 'seed': int(given['seed'])}
    if platform in ('carla_native', 'leaderboard'):
        own['carla_state'] = {}
    if role != usual:  # the files say the usual one
        own['controller']['role_name'] = role
        prefix = '' if platform == 'sim' else 'rgb_'
        if usual:  # else nothing but the command goes to CARLA
            own['view_router']['camera_topic'] = f'/carla/{role}/{prefix}{{camera}}/image'
            own['driver']['base_frame'] = role
        for name in own.keys() & {'simulator', 'carla_state'}:
            own[name]['role_name'] = role
    for name in ('control_backend', 'command_topic'):
        if given[name]:
            own['controller'][name] = given[name]
    if given['cameras']:
        own['view_router'].update(_cameras(given['cameras']))
    return own


def _builders(given, files, share):
    """Return what builds the engines of all bundles where the nodes will look for them."""
    engine = Path(get_package_prefix('mose_ros')) / 'lib' / 'mose_ros' / 'engine'
    commands = {}
    for node in NETWORKS:
        wanted = {
            name: given.get(name) or _setting(given, files, node, name)
            for name in ('bundle', 'backend', 'engines')
        }
        command = [str(engine), 'build', wanted['bundle'] or str(share / 'models' / 'mose-tiny')]
        command += ['--backend', wanted['backend'] or 'auto']
        if wanted['engines']:
            command += ['--engines', wanted['engines']]
        commands[tuple(command)] = ExecuteProcess(cmd=command, output='screen')
    return list(commands.values())


def _player(given, files, router):
    """Return the parameters of the bag's player, which has its cameras where the view router seeks them."""
    if not Path(given['bag']).exists():
        raise RuntimeError(f'bag:={given["bag"]} does not exist')
    found = {
        name: _of_router(given, {'view_router': router}, files, name)
        for name in ('cameras', 'camera_topic', 'camera_topics')
    }
    return {
        'bag': str(Path(given['bag']).resolve()),
        'start_s': float(given['bag_start']),
        'rate': float(given['bag_rate']),
        **{name: value for name, value in found.items() if value},
    }


def _of_router(given, own, files, name):
    """Return a parameter of the view router as it will be: what the arguments say, else what the files say."""
    return own['view_router'].get(name) or _setting(given, files, 'view_router', name)


def _cameras(text):
    """Return the parameters for 'front,back' or 'front=/a,back=/b'."""
    pairs = [one.strip().partition('=') for one in text.split(',')]
    names = [name for name, _, _ in pairs]
    topics = [topic for _, _, topic in pairs if topic]
    if not all(names) or len(topics) not in (0, len(names)):
        raise RuntimeError(
            f"cameras:={text}: give names as 'front,back', or every one with its topic as 'front=/a,back=/b'"
        )
    return {'cameras': names, **({'camera_topics': topics} if topics else {})}


def _is_yes(value, automatic):
    return automatic if value == 'auto' else value == 'true'


def _file(name, path):
    if not Path(path).is_file():
        raise RuntimeError(f'{name}:={path} is no file')
    return path


def _setting(given, files, node, name):
    """Return what the parameters files say of one parameter of one node, by rcl's rules; the last that speaks of it wins."""
    found = ''
    for path in files:
        for key, section in (yaml.safe_load(Path(path).read_text()) or {}).items():
            if speaks_of(key, given['namespace'], node):
                found = section.get('ros__parameters', {}).get(name, found)
    return found


def _environment(given, share):
    """Return the actions that set what DDS and SROS2 read."""
    variables = {}
    profile = given['fastdds_profile']
    if profile == 'auto':
        if not any(one in os.environ for one in PROFILES_FILE):
            variables[_profiles_file()] = str(share / 'config' / 'fastdds_shm.xml')
    elif profile not in ('', 'none'):
        variables[_profiles_file()] = str(Path(_file('fastdds_profile', profile)).resolve())
    if given['enclave']:
        variables.update(ROS_SECURITY_ENABLE='true', ROS_SECURITY_STRATEGY='Enforce')
    return [SetEnvironmentVariable(name, value) for name, value in variables.items()]


def _check_enclave(given, own):
    """Raise RuntimeError where security is asked for and can't be."""
    if not given['enclave']:
        return
    if not given['enclave'].startswith('/'):
        raise RuntimeError(f'enclave:={given["enclave"]} begins with a slash, as /mose')
    if 'ROS_SECURITY_KEYSTORE' not in os.environ:
        raise RuntimeError('enclave:= needs ROS_SECURITY_KEYSTORE: the folder that holds the keys')
    others = own.keys() - {*NETWORKS, 'controller'}
    if others:
        raise RuntimeError(
            f'enclave:= with platform:={given["platform"]}: there is no policy, and so no keys, for {", ".join(others)}'
        )


def _profiles_file():
    """Return by what name this distribution's Fast DDS is told its profiles: 3.0, Kilted's, has another."""
    return PROFILES_FILE[os.environ.get('ROS_DISTRO') in ('humble', 'iron', 'jazzy')]


def _sends_pictures(given, share):
    """Return the environment of a node that sends large pictures: more shared memory than who hears them needs."""
    if given['fastdds_profile'] != 'auto' or any(one in os.environ for one in PROFILES_FILE):
        return {}
    return {_profiles_file(): str(share / 'config' / 'fastdds_cameras.xml')}


def _commands(given, own, files):
    """Return the topics that the controller may publish to."""
    topic, role = (
        own.get(name) or _setting(given, files, 'controller', name)
        for name in ('command_topic', 'role_name')
    )
    names = ('vehicle_control_cmd', 'ackermann_cmd', 'ackermann_control_cmd', 'twist')
    usual = [f'/carla/{role or "ego_vehicle"}/{name}' for name in names]  # the node's own default
    return [topic] if topic else usual


def _record(given, topics, is_simulated):
    """Return the recorder of what the nodes hear and say: all of our namespace, and their inputs wherever they are."""
    namespace = given['namespace'].strip('/')
    patterns = [f'/{namespace}/.*', '/diagnostics', '/tf', '/tf_static', '/rosout']
    for topic in topics:
        if topic.startswith('/'):  # else it lies in our namespace
            patterns.append('[^/]+'.join(map(re.escape, topic.split('{camera}'))))
    command = ['ros2', 'bag', 'record', '--regex', f'^({"|".join(patterns)})$']
    if given['record'] != 'true':
        command += ['--output', given['record']]
    if is_simulated:  # else the bag would be stamped by another clock than its messages
        command.append('--use-sim-time')
    keys = {'ROS_SECURITY_ENCLAVE_OVERRIDE': _operator(given)} if given['enclave'] else None
    return ExecuteProcess(cmd=command, output='screen', additional_env=keys)


def _operator(given):
    """Return the enclave of whoever watches."""
    return f'{given["enclave"].rstrip("/")}/operator'


def _rviz(given, share, topics, base_frame, is_simulated):
    """Return rviz2 with our display, in which namespace, topics and frame are filled in."""
    text = (share / 'config' / 'mose.rviz').read_text()
    namespace = given['namespace'].strip('/')
    values = {'NAMESPACE': f'/{namespace}', 'FRAME': base_frame}
    for name, topic in topics.items():
        values[name.upper()] = topic if topic.startswith('/') else f'/{namespace}/{topic}'
    for name, value in values.items():
        text = text.replace(f'@{name}@', value)
    with tempfile.NamedTemporaryFile('w', prefix='mose_', suffix='.rviz', delete=False) as file:
        file.write(text)
    return Node(
        package='rviz2',
        executable='rviz2',
        arguments=['-d', file.name],
        parameters=[{'use_sim_time': is_simulated}],
        ros_arguments=['--enclave', _operator(given)] if given['enclave'] else [],
    )

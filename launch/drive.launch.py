"""Start the vehicle's nodes on a machine with ROS: ros2 launch mose_ros drive.launch.py --show-args"""

import os
from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

PLATFORMS = {  # platform: where odometry and route come from, whether time is simulated, the role of the vehicle
    'sim': ('/carla/{role}/odometry', '/carla/{role}/waypoints', False, 'ego_vehicle'),
    'carla_bridge': ('/carla/{role}/odometry', '/carla/{role}/waypoints', True, 'ego_vehicle'),
    'carla_native': ('/carla/{role}/odometry', '/carla/{role}/global_plan', True, 'hero'),
    'leaderboard': ('/carla/{role}/odometry', '/carla/{role}/route', True, 'hero'),
    'vehicle': ('odometry', 'route', False, ''),
    'bag': ('odometry', 'route', True, ''),
}
ARGUMENTS = {  # name: default, choices, description
    'platform': ('sim', list(PLATFORMS), 'what drives: our simulator, CARLA, a vehicle, or a bag'),
    'namespace': ('mose', None, 'namespace of nodes and relative topics'),
    'role_name': (
        '',
        None,
        'role of the vehicle in CARLA; empty: ego_vehicle, or hero where CARLA wants it',
    ),
    'use_sim_time': ('auto', ['auto', 'true', 'false'], 'time from /clock; auto: as the platform'),
    'params_file': ('', None, 'ROS parameters that override those of config/'),
    'bundle': (
        '',
        None,
        'folder of the exported network; empty: models/mose-tiny of this package',
    ),
    'backend': ('auto', None, 'inference backend'),
    'family': ('normal', None, 'scenario family of platform sim'),
    'seed': ('1', None, 'seed of platform sim'),
    'log_level': ('info', ['debug', 'info', 'warn', 'error'], 'what the nodes log'),
    'autostart': ('true', ['true', 'false'], 'configure and activate the nodes at once'),
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
    """Return the actions for the values of the arguments."""
    given = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    share = Path(get_package_share_directory('mose_ros'))
    platform = given['platform']
    odometry, route, has_clock, usual = PLATFORMS[platform]
    role = given['role_name'] or usual
    odometry, route = (topic.format(role=role) for topic in (odometry, route))
    common = {
        'use_sim_time': has_clock
        if given['use_sim_time'] == 'auto'
        else given['use_sim_time'] == 'true',
        'autostart': given['autostart'] == 'true',
    }
    network = {
        'bundle': given['bundle'] or str(share / 'models' / 'mose-tiny'),
        'backend': given['backend'],
    }
    own = {'view_router': network, 'driver': network, 'controller': {}}
    if platform == 'sim':
        own['simulator'] = {'family': given['family'], 'seed': int(given['seed'])}
    if platform in ('carla_native', 'leaderboard'):
        own['carla_state'] = {}
    if role != usual:  # the files say the usual one
        own['controller'] = {'role_name': role}
        prefix = '' if platform == 'sim' else 'rgb_'
        if usual:  # else nothing but the command goes to CARLA
            topic = f'/carla/{role}/{prefix}{{camera}}/image'
            own['view_router'] = {**network, 'camera_topic': topic}
            own['driver'] = {**network, 'base_frame': role}
        for name in own.keys() & {'simulator', 'carla_state'}:
            own[name]['role_name'] = role
    config = 'drive.yaml' if platform == 'sim' else f'{platform}.yaml'
    files = [str(share / 'config' / config), *filter(None, [given['params_file']])]
    actions = []
    if 'FASTDDS_DEFAULT_PROFILES_FILE' not in os.environ:
        profile = str(share / 'config' / 'fastdds_shm.xml')
        actions.append(SetEnvironmentVariable('FASTDDS_DEFAULT_PROFILES_FILE', profile))
    for name, parameters in own.items():
        actions.append(
            Node(
                package='mose_ros',
                executable=name,
                name=name,
                namespace=given['namespace'],
                output='screen',
                parameters=[*files, {**common, **parameters}],
                remappings=[('odometry', odometry), ('route', route)],
                ros_arguments=['--log-level', given['log_level']],
            )
        )
    return actions

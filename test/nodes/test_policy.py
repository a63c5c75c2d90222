"""The SROS2 policy allows what the nodes declare, and nothing else; and security that cannot be had ends the start."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import rclpy
from std_msgs.msg import String

from mose_ros.nodes import policy
from mose_ros.nodes.lifecycle import ManagedNode, NodeParameters
from nodes.test_launch import drive, nodes  # noqa: F401

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / 'config/sros2/vehicle.xml'


def rights(path=SHIPPED):
    """Return enclave -> right -> names."""
    found = {}
    for enclave in ElementTree.parse(path).iter('enclave'):
        own = found.setdefault(enclave.get('path'), {})
        for group in enclave.iter():
            for right, value in group.attrib.items():
                if value == 'ALLOW':
                    own[right] = {one.text for one in group}
    return found


def test_the_shipped_policy_is_what_the_nodes_declare(vehicle_messages, bundle):
    made = policy.make(str(ROOT / 'config/vehicle.yaml'), bundle=bundle)
    again = 'python -m mose_ros.nodes.policy --params-file config/vehicle.yaml'
    assert made == SHIPPED.read_text(), f'make it again: {again} > config/sros2/vehicle.xml'
    assert 'ackermann_cmd' in made


def test_other_parameters_make_another_policy(bundle):
    remaps = ['odometry:=/carla/ego_vehicle/odometry', 'route:=/carla/ego_vehicle/waypoints']
    made = policy.make(
        str(ROOT / 'config/drive.yaml'), bundle=bundle, enclave='/e/', remaps=remaps
    )
    assert '<enclave path="/e/driver">' in made and '/carla/ego_vehicle/waypoints' in made
    assert (
        '/mose/vehicle_command' in made and 'ackermann' not in made and '/mose/route' not in made
    )


def test_commands_on_a_topic_of_ones_own_are_allowed_there_alone(bundle, tmp_path):
    mine = tmp_path / 'mine.yaml'
    mine.write_text('/**/controller:\n  ros__parameters: {command_topic: /dbw/cmd}\n')
    made = tmp_path / 'made.xml'
    made.write_text(policy.make(str(mine), bundle=bundle))
    found = rights(made)
    assert '/dbw/cmd' in found['/mose/controller']['publish']
    assert '/dbw/cmd' in found['/mose/actuators']['subscribe']
    assert 'vehicle_command' not in made.read_text()


def test_a_namesake_in_the_graph_changes_nothing(bundle):
    params = str(ROOT / 'config/drive.yaml')
    alone = policy.make(params, bundle=bundle)
    context = rclpy.Context()
    rclpy.init(context=context)
    namesake = rclpy.create_node('driver', namespace='/mose', context=context)
    namesake.create_subscription(String, 'gossip', print, 1)
    try:
        assert policy.make(params, bundle=bundle) == alone and 'gossip' not in alone
    finally:
        namesake.destroy_node()
        rclpy.shutdown(context=context)


def test_every_node_of_the_launch_file_has_an_enclave(drive, monkeypatch):  # noqa: F811
    monkeypatch.setenv('ROS_SECURITY_KEYSTORE', '/keys')
    launched = nodes(drive, platform='vehicle', enclave='/mose').values()
    words = [node.ros_arguments for node in launched]
    enclaves = {one[one.index('--enclave') + 1] for one in words}
    assert enclaves == {'/mose/view_router', '/mose/driver', '/mose/controller'}
    assert enclaves < rights().keys()


def test_nobody_may_do_more_than_it_must():
    found = rights()
    commands = '/carla/ego_vehicle/ackermann_cmd'
    assert [e for e, own in found.items() if commands in own['publish']] == ['/mose/controller']
    assert [e for e, own in found.items() if '/mose/trajectory' in own['publish']] == [
        '/mose/driver'
    ]
    cameras = [
        enclave
        for enclave, own in found.items()
        if any('/camera/' in topic for topic in own.get('subscribe', ()))
    ]
    assert cameras == ['/mose/view_router', '/mose/operator']
    callers = [enclave for enclave, own in found.items() if 'request' in own]
    assert callers == ['/mose/operator'] and 'reply' not in found['/mose/operator']
    assert '/mose/emergency_stop' not in found['/mose/sensors']['publish']
    wild = {
        name for own in found.values() for names in own.values() for name in names if '*' in name
    }
    assert all(name.endswith('/debug/*') for name in wild)


def test_debug_topics_lie_where_the_policy_allows_them(context):
    node = ManagedNode('some', NodeParameters, context=context, namespace='/mose')
    allowed = policy.needs_of(node).publish
    node.debug(processing_time_ms=1.0)
    names = {name for name, _ in node.get_publisher_names_and_types_by_node('some', '/mose')}
    node.destroy_node()
    added = names - allowed
    assert added == {'/mose/some/debug/processing_time_ms'}
    assert '/mose/some/debug/*' in allowed


def test_without_keys_or_plugins_a_secured_node_does_not_start(tmp_path):
    """The wheels' Fast DDS is built without the security plugins: a node that is told to be secure must not run without."""
    environment = {
        **os.environ,
        'PYTHONPATH': str(ROOT),
        'ROS_SECURITY_ENABLE': 'true',
        'ROS_SECURITY_STRATEGY': 'Enforce',
        'ROS_SECURITY_KEYSTORE': str(tmp_path),
    }
    command = [sys.executable, '-m', 'mose_ros.nodes.controller_node']
    command += ['--ros-args', '--enclave', '/mose/controller']
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and 'error: ' in done.stderr and 'SECURITY' in done.stderr.upper()
    assert 'Traceback' not in done.stderr

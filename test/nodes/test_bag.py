"""A recorded drive is played to nodes that wait for it: with its time, from any second on, and with a route whatever was recorded."""

import numpy as np
import pytest
from nav_msgs.msg import Odometry, Path
from rclpy.serialization import serialize_message
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image
from std_msgs.msg import Header, String

from mose_ros.core.types import EgoState
from mose_ros.nodes import conversions, images
from mose_ros.nodes.bag_node import BagNode
from mose_ros.nodes.driver_node import DriverNode
from mose_ros.nodes.view_router_node import ViewRouterNode
from nodes.graph import Ear

rosbags = pytest.importorskip(
    'rosbags', reason='rosbags is not installed: pip install -e ".[bag]"'
)
RECORDED = 1_700_000_000.0  # s of the recorder's clock
SECONDS = 3.0


def record(folder, *, stamps_from=RECORDED, has_route=True, storage='SQLITE3'):
    """Write a bag of a drive straight on at 5 m/s: two cameras at 10 Hz; the route once, at the beginning, as a latched one is."""
    from rosbags.rosbag2 import StoragePlugin, Writer
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_HUMBLE)
    topics = {'camera/front': Image, 'camera/back': Image, 'odometry': Odometry, 'route': Path}
    topics['trajectory'] = Header  # what a node said then: of no interest now
    with Writer(folder, version=8, storage_plugin=StoragePlugin[storage]) as writer:
        names = {
            topic: f'{kind.__module__.split(".")[0]}/msg/{kind.__name__}'
            for topic, kind in topics.items()
        }
        opened = {
            topic: writer.add_connection(f'/mose/{topic}', name, typestore=store)
            for topic, name in names.items()
            if has_route or topic != 'route'
        }

        def write(topic, time, msg):
            writer.write(opened[topic], round(time * 1e9), serialize_message(msg))

        if has_route:
            straight = np.stack([np.arange(0.0, 200.0, 5.0), np.zeros(40)], 1)
            stamp = conversions.to_stamp(0.0)
            write('route', RECORDED, conversions.polyline_to_msg(straight, stamp, 'map'))
        for index in range(round(10 * SECONDS)):
            passed = 0.1 * index
            stamp = conversions.to_stamp(stamps_from + passed)
            ego = EgoState(x=5 * passed, y=0.0, yaw=0.0, speed=5.0)
            odometry = conversions.ego_to_msg(ego, stamp, 'map', 'base_link')
            write('odometry', RECORDED + passed + 0.001, odometry)
            picture = images.image_to_msg(np.full((72, 128, 3), 90, np.uint8), stamp, 'camera')
            for camera in ('back', 'front'):
                write(f'camera/{camera}', RECORDED + passed + 0.002, picture)
            write('trajectory', RECORDED + passed, Header())
    return str(folder)


RIG = {'cameras': ['front', 'back'], 'camera_topic': 'camera/{camera}'}


def listening(graph):
    topics = {'camera/front': Image, 'odometry': Odometry, 'trajectory': Header}
    ear = graph.spin(Ear(graph.context, **topics, **{'/clock': Clock}))
    return ear


@pytest.mark.parametrize('storage', ['SQLITE3', 'MCAP'])
def test_inputs_are_played_with_the_time_of_the_recording(graph, tmp_path, storage):
    ear = listening(graph)
    bag = record(tmp_path / 'bag', storage=storage)
    graph.start(BagNode, bag=bag, rate=4.0, wait_for=[], **RIG)
    ear.wait('camera/front', lambda msg: seconds(msg) > RECORDED + SECONDS - 0.2, timeout=20.0)
    for _, msg in ear.heard['odometry']:
        assert RECORDED <= seconds(msg) < RECORDED + SECONDS
    clock = [conversions.seconds(msg.clock) for _, msg in ear.heard['/clock']]
    assert clock == sorted(clock) and RECORDED <= clock[0] < RECORDED + 1
    assert not ear.heard['trajectory']  # what was said then is not mixed with what is said now


def test_time_is_that_of_the_stamps_where_the_recorder_had_another_clock(graph, tmp_path):
    ear = listening(graph)
    bag = record(tmp_path / 'bag', stamps_from=20.0)  # a simulator's
    graph.start(BagNode, bag=bag, rate=4.0, wait_for=[], **RIG)
    _, msg = ear.wait('/clock', timeout=20.0)
    assert 19.9 < conversions.seconds(msg.clock) < 20.0 + SECONDS


def heard_route(graph, **parameters):
    ear = Ear(graph.context)
    node = graph.start(BagNode, wait_for=[], **RIG, **parameters)
    from mose_ros.nodes.lifecycle import LATCHED

    ear.create_subscription(Path, 'route', ear._listener('route'), LATCHED)
    graph.spin(ear)
    _, msg = ear.wait('route', timeout=20.0)
    return conversions.polyline_from_msg(msg), node


def test_a_route_from_before_the_start_is_there_and_stays(graph, tmp_path):
    bag = record(tmp_path / 'bag')
    points, _ = heard_route(graph, bag=bag, start_s=2.0)
    assert points[-1].tolist() == [195.0, 0.0]


def test_without_a_recorded_route_the_way_that_was_driven_is_it(graph, tmp_path):
    bag = record(tmp_path / 'bag', has_route=False)
    points, node = heard_route(graph, bag=bag)
    assert points[0].tolist() == [0.0, 0.0] and points[-1][0] > 100  # and straight on from its end
    assert np.abs(points[:, 1]).max() < 1e-6
    assert 'the way that was driven' in node._health['bag'].message


def test_the_nodes_plan_on_a_bag_that_waits_for_them(graph, bundle, tmp_path):
    time = {'use_sim_time': True, 'bundle': bundle, 'max_age_s': 5.0}
    ear = graph.spin(Ear(graph.context, skills=String))
    bag = record(tmp_path / 'bag')
    graph.start(BagNode, bag=bag, loop=True, wait_for=['view_router', 'driver'], **RIG)
    graph.start(ViewRouterNode, **time, **RIG)
    graph.start(DriverNode, **time)
    ear.wait('skills', timeout=30.0)


@pytest.mark.parametrize(
    ('parameters', 'words'),
    [
        ({'bag': 'nowhere'}, 'does not exist'),
        ({'start_s': 60.0}, 'lasts'),
        ({'camera_topic': '/cam/{camera}'}, 'lacks /cam/front, /cam/back; it has /mose/'),
    ],
)
def test_bags_that_can_not_be_played_are_named(graph, tmp_path, parameters, words):
    bag = record(tmp_path / 'bag')
    node = graph.start(BagNode, **{'bag': bag, 'autostart': False, **RIG, **parameters})
    with pytest.raises(ValueError, match=words):
        node.configure()
    node.cleanup()


def test_a_folder_that_is_no_bag_is_named(graph, tmp_path):
    (tmp_path / 'metadata.yaml').write_text('no: bag\n')
    node = graph.start(BagNode, bag=str(tmp_path), autostart=False)
    with pytest.raises(ValueError, match='can not be read as a ROS 2 bag'):
        node.configure()


def seconds(msg):
    return conversions.seconds(msg.header.stamp)

"""Where the vehicle is and shall go, as a node hears it, also after time or the route has begun anew."""

import math
import time

import numpy as np
import pytest
from nav_msgs.msg import Odometry, Path
from rclpy.node import Node
from std_msgs.msg import String

from mose_ros.core.types import Command, EgoState
from mose_ros.nodes import conversions
from mose_ros.nodes.bearings import Bearings
from mose_ros.nodes.lifecycle import LATCHED, ManagedNode, NodeParameters
from nodes.graph import NAMESPACE

ROUND = np.array([(0.0, 0.0), (99.0, 0.0), (99.0, 99.0), (0.0, 99.0), (0.0, 1.0)])


@pytest.fixture
def told(graph):
    """Return bearings, and a function that tells them odometry, route and command and returns the guidance."""
    space = {'context': graph.context, 'namespace': NAMESPACE}
    bearings = Bearings(graph.spin(ManagedNode('anyone', NodeParameters, **space)), 0.05)
    teller = graph.spin(Node('teller', **space))
    odometry = teller.create_publisher(Odometry, 'odometry', 10)
    route = teller.create_publisher(Path, 'route', LATCHED)
    command = teller.create_publisher(String, 'command', 10)

    def tell(at, ego, way=None, asked=None, wanted=None):
        """Wait until it is known; `wanted`: the command that it leads to."""
        stamp = conversions.to_stamp(at)
        if way is not None:
            route.publish(conversions.polyline_to_msg(way, stamp, 'map'))
        while asked and command.get_subscription_count() == 0:
            time.sleep(0.01)
        if asked:  # once, so that none is still under way when it is known
            command.publish(String(data=asked))
        deadline = time.monotonic() + 20.0
        while time.monotonic() < deadline:
            odometry.publish(conversions.ego_to_msg(ego, stamp, 'map', 'car'))
            time.sleep(0.05)
            try:
                _, guidance = bearings.at(at)
            except ValueError:
                continue
            if wanted in (None, guidance.command):
                return guidance
        raise AssertionError('it is not known within 20 s')

    return bearings, tell


def test_on_a_round_the_place_is_sought_anew_and_the_command_is_forgotten_with_the_time(told):
    bearings, tell = told
    end = EgoState(x=0.0, y=4.0, yaw=-math.pi / 2, speed=3.0)
    begin = EgoState(x=1.0, y=0.0, yaw=0.0, speed=3.0)
    tell(100.0, end, way=ROUND, asked='left', wanted=Command.LEFT)
    bearings.clear()
    guidance = tell(5.0, begin)
    assert guidance.near == pytest.approx((10.0, 0.0), abs=0.1)
    assert guidance.command is not Command.LEFT


def test_who_only_drives_on_keeps_place_and_command(told):
    _, tell = told
    end = EgoState(x=0.0, y=4.0, yaw=-math.pi / 2, speed=3.0)
    tell(100.0, end, way=ROUND, asked='left', wanted=Command.LEFT)
    guidance = tell(101.0, EgoState(x=0.0, y=1.0, yaw=-math.pi / 2, speed=3.0), way=ROUND)
    assert guidance.near == pytest.approx((10.0, 0.0), abs=0.1)  # straight on, beyond the end
    assert guidance.command is Command.LEFT


def test_another_route_takes_the_command_with_it(told):
    _, tell = told
    ego = EgoState(x=1.0, y=0.0, yaw=0.0, speed=3.0)
    tell(100.0, ego, way=ROUND, asked='left', wanted=Command.LEFT)
    straight = np.array([(0.0, 0.0), (200.0, 0.0)])
    assert tell(101.0, ego, way=straight, wanted=Command.FOLLOW).command is Command.FOLLOW

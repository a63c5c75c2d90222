"""The node that plays a recorded drive to the others: their inputs out of a ROS 2 bag, with the time of the recording.

Unlike `ros2 bag play` it begins when everybody listens, plays inputs only (what the nodes said then would be mixed with what
they say now), and knows that a route is latched: one that lies before the start, or that was recorded as volatile, is
published at the start and stays. A bag without any route gets the way that was driven.
"""

import importlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as RosPath
from rclpy.serialization import deserialize_message
from rosgraph_msgs.msg import Clock
from std_msgs.msg import Header

from mose_ros.core.rig import CAMERAS
from mose_ros.nodes import conversions
from mose_ros.nodes.lifecycle import (
    LATCHED,
    OK,
    SENSOR,
    WARN,
    ManagedNode,
    NodeParameters,
    run_node,
)
from mose_ros.nodes.parameters import parameter
from mose_ros.nodes.simulator_node import BRIDGE

TICK_S = 0.005
APART_S = 10.0  # stamps that are further from the time of recording are of another clock, as a simulator's
SPACING_M = 2.0  # of the points of a route made from odometry
BEYOND_M = 100.0  # that route goes on straight, since the far point lies ahead of the vehicle
STAMPED = {'sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage', 'nav_msgs/msg/Odometry'}


@dataclass(frozen=True, kw_only=True)
class BagParameters(NodeParameters):
    """Parameters of the player; cameras and topics as the view router's."""

    bag: str = parameter('', 'folder of a ROS 2 bag, sqlite3 or mcap')
    start_s: float = parameter(0.0, 'seconds of the bag to leave out', minimum=0.0)
    rate: float = parameter(1.0, 'times as fast as recorded', minimum=0.05, maximum=20.0)
    loop: bool = parameter(False, 'begin again at the end; time goes back then', live=True)
    cameras: tuple[str, ...] = parameter(CAMERAS, 'names of the cameras')
    camera_topic: str = parameter(
        'camera/{camera}/image_raw/compressed', 'topic of a camera; {camera} is its name'
    )
    camera_topics: tuple[str, ...] = parameter(
        (), 'instead of camera_topic: one topic for each of `cameras`, in order'
    )
    wait_for: tuple[str, ...] = parameter(
        ('view_router', 'driver', 'controller'), 'autostart only when these nodes are active'
    )


class BagNode(ManagedNode):
    """Publishes cameras, odometry, route, command and /clock as they were recorded."""

    def __init__(self, **options):
        super().__init__('bag', BagParameters, **options)
        self._reader, self._awake = None, set()

    def configure(self) -> None:
        p = self.parameters
        self._reader = open_bag(p.bag)
        self._begin = self._reader.start_time + int(p.start_s * 1e9)
        if self._begin >= self._reader.end_time:
            raise ValueError(f'start_s {p.start_s}: {p.bag} lasts {self._seconds():.1f} s only')
        known = {one.topic: one for one in self._reader.connections}
        names = p.camera_topics or [p.camera_topic.format(camera=name) for name in p.cameras]
        topics = {name: self.resolve_topic_name(name) for name in ('odometry', 'route', 'command')}
        pictures = [self.resolve_topic_name(name) for name in names]
        lacking = [one for one in [*pictures, topics['odometry']] if one not in known]
        if topics['odometry'] in lacking or len(set(pictures) - known.keys()) == len(pictures):
            raise ValueError(f'{p.bag} lacks {", ".join(lacking)}; it has {", ".join(known)}')
        if lacking:
            self.report('topics', WARN, f'the bag lacks {", ".join(lacking)}')
        self._route_topic, self._odometry_topic = topics['route'], topics['odometry']
        self._wanted = [known[one] for one in [*pictures, *topics.values()] if one in known]
        self._clock_topic = self.create_lifecycle_publisher(Clock, '/clock', BRIDGE)
        self._publishers_of = {
            one.topic: self.create_lifecycle_publisher(
                message_class(one.msgtype),
                one.topic,
                LATCHED if one.topic == self._route_topic else BRIDGE,
            )
            for one in self._wanted
        }
        if self._route_topic not in self._publishers_of:
            self._publishers_of[self._route_topic] = self.create_lifecycle_publisher(
                RosPath, self._route_topic, LATCHED
            )
        self._shift = self._clock_shift()
        for name in p.wait_for:
            self.create_subscription(Header, f'{name}/heartbeat', self._waiter(name), SENSOR)

    def activate(self) -> None:
        self._rewind()
        self._timer = self.create_timer(TICK_S, self._tick, clock=self.steady)

    def deactivate(self) -> None:
        if self._timer:
            self.destroy_timer(self._timer)
        self._timer = None

    def cleanup(self) -> None:
        self._timer = self._messages = self._next = None
        if self._reader:
            self._reader.close()
        self._reader = None

    def may_activate(self) -> bool:
        heard = [self._publishers_of[one.topic] for one in self._wanted]
        is_heard = not self.parameters.wait_for or any(
            one.get_subscription_count() for one in heard
        )
        return set(self.parameters.wait_for) <= self._awake and is_heard

    _timer = _messages = _next = None

    def _waiter(self, name: str):
        def beat(msg: Header):
            if msg.frame_id == 'active':
                self._awake.add(name)

        return beat

    # ---- playing ----

    def _rewind(self) -> None:
        self._messages = self._reader.messages(self._wanted, start=self._begin)
        self._next = next(self._messages, None)
        self._started = self.steady.now().nanoseconds
        self._has_route = False

    def _tick(self) -> None:
        if not self.is_active or self._next is None:
            return
        passed = (self.steady.now().nanoseconds - self._started) * self.parameters.rate
        moment = self._begin + int(passed)
        self._clock_topic.publish(Clock(clock=conversions.to_stamp(1e-9 * (moment + self._shift))))
        if not self._has_route:
            self._publish_route()
        while self._next is not None and self._next[1] <= moment:
            connection, _, data = self._next
            self._publishers_of[connection.topic].publish(bytes(data))
            self._next = next(self._messages, None)
        if self._next is None:
            self._end()

    def _end(self) -> None:
        if self.parameters.loop:
            self.get_logger().info('the bag begins again')
            self._rewind()
        else:
            self.report('bag', OK, 'has ended', seconds=round(self._seconds(), 1))

    def _publish_route(self) -> None:
        """Publish the newest route from before the start; where the bag has none at all, the way that was driven."""
        self._has_route = True
        routes = [one for one in self._wanted if one.topic == self._route_topic]
        publisher, newest = self._publishers_of[self._route_topic], None
        for _, time, data in self._reader.messages(routes) if routes else ():
            if time > self._begin and newest is not None:
                break
            newest = data
        if newest is not None:
            publisher.publish(bytes(newest))
            self.report('bag', OK, 'plays', route='recorded', seconds=round(self._seconds(), 1))
            return
        publisher.publish(self._driven_route())
        said = f'{self._route_topic} is not in the bag: the way that was driven is the route'
        self.report('bag', WARN, said)

    def _driven_route(self) -> RosPath:
        points: list[np.ndarray] = []
        frame = 'map'
        for _, _, data in self._reader.messages(self._only(self._odometry_topic)):
            msg = deserialize_message(bytes(data), Odometry)
            frame, place = msg.header.frame_id or frame, msg.pose.pose.position
            point = np.array([place.x, place.y])
            if not points or np.hypot(*(point - points[-1])) >= SPACING_M:
                points.append(point)
        if len(points) == 1:  # it stood: straight on
            yaw = conversions.yaw_of(msg.pose.pose.orientation)
            points.append(points[0] + SPACING_M * np.array([np.cos(yaw), np.sin(yaw)]))
        heading = (points[-1] - points[-2]) / np.hypot(*(points[-1] - points[-2]))
        points.append(points[-1] + BEYOND_M * heading)
        return conversions.polyline_to_msg(np.array(points), conversions.to_stamp(0.0), frame)

    # ---- the bag ----

    def _only(self, topic: str) -> list:
        return [one for one in self._wanted if one.topic == topic]

    def _seconds(self) -> float:
        return (self._reader.end_time - self._begin) * 1e-9

    def _clock_shift(self) -> int:
        """Return ns from the time of recording to that of the stamps, 0 where they are of the same clock."""
        stamped = [one for one in self._wanted if one.msgtype in STAMPED]
        for time, stamp in self._stamps(stamped):
            shift = stamp - time
            if abs(shift) > APART_S * 1e9:
                self.report('clock', OK, f'stamps are {shift * 1e-9:.1f} s from the recording')
                return shift
            return 0
        raise ValueError(f'{self.parameters.bag} has no picture and no odometry after start_s')

    def _stamps(self, connections) -> Iterator[tuple[int, int]]:
        """Yield time of recording and stamp in ns; a message that begins with a header has it after CDR's 4 bytes."""
        for _, time, data in self._reader.messages(connections, start=self._begin):
            order = '<' if data[1] & 1 else '>'
            seconds, nanoseconds = struct.unpack_from(f'{order}iI', data, 4)
            yield time, seconds * 1_000_000_000 + nanoseconds


def open_bag(path: str):
    """Open a bag; ValueError says what is wrong with it."""
    try:
        from rosbags.rosbag2 import Reader, ReaderError
    except ImportError:
        raise ValueError(
            'a bag is played with the package rosbags: pip install rosbags; or play it with `ros2 bag play`'
        ) from None
    if not Path(path).exists():
        raise ValueError(f'bag {path!r} does not exist')
    try:
        reader = Reader(path)
        reader.open()
    except (ReaderError, OSError, ValueError) as error:
        raise ValueError(f'{path} can not be read as a ROS 2 bag: {error}') from None
    if not reader.message_count:
        raise ValueError(f'{path} holds no message')
    return reader


def message_class(msgtype: str) -> type:
    """Return the class of `package/msg/Name`; ValueError where its package is not installed."""
    package, _, name = msgtype.split('/')
    try:
        return getattr(importlib.import_module(f'{package}.msg'), name)
    except (ImportError, AttributeError):
        raise ValueError(f'the bag has {msgtype}: install {package}') from None


def main() -> None:
    """Run this node until it is told to end."""
    run_node(BagNode)


if __name__ == '__main__':
    main()

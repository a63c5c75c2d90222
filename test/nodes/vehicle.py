"""A car on a round road that really brakes and steers as commanded, and whose sensors can be made to lie; for tests of faults.

Odometry comes at 20 Hz, six cameras at 10 Hz. It notes when each stamp was really given, so that it can say how old the pictures
are that a command was made of.
"""

import math
import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from nav_msgs.msg import Odometry, Path
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Header, String

from mose_ros.core.control import METADRIVE
from mose_ros.core.rig import CAMERAS
from mose_ros.core.types import EgoState, VehicleCommand
from mose_ros.nodes import conversions, images
from mose_ros.nodes.lifecycle import LATCHED, SENSOR
from mose_ros.nodes.vehicle_command import command_from_joint_state

TICK_S = 0.05
RADIUS, ROUTE_M = 100.0, 12_000.0  # of the round road, driven many times
OWN_TIMEOUT_S = 0.5  # after so long without command a vehicle brakes by itself
BRAKING = VehicleCommand(steer=0.0, throttle=0.0, brake=0.2)
SIZE = (72, 128)


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A command that left the controller."""

    left: float  # steady clock
    command: VehicleCommand | None  # None: it was none, or not finite
    age: (
        float | None
    )  # s, of the pictures whose stamp it carries, pauses not counted; None: the stamp is no picture's


def circle(metres):
    """Return the point of the road after so many metres."""
    return RADIUS * np.sin(metres / RADIUS), RADIUS - RADIUS * np.cos(metres / RADIUS)


class Vehicle(Node):
    """Publishes what its sensors show and drives as commanded. Fields are changed by whoever injects faults."""

    def __init__(self, context, is_simulated=False):
        super().__init__('vehicle', context=context, namespace='/mose')
        self.x = self.y = self.yaw = self.speed = self.driven = 0.0
        self.offset = 0.0  # s that the clock of all stamps is set off by
        self.is_paused = False  # a simulator that stands still
        self.pauses: list[tuple[float, float]] = []  # from, to; inf while it lasts
        self.change = {}  # camera -> function of its message that returns the messages to send
        self.change_odometry = lambda msg: msg  # None: it is lost
        self.heard: list[Heard] = []
        self.states: list[
            tuple[float, str]
        ] = []  # steady clock, the controller's state and reason
        self.complaints: list[tuple[float, str]] = []
        self.timeouts: list[float] = []  # when the vehicle began to brake by itself
        self.beats: dict[str, float] = {}
        self.lock = threading.Lock()
        self._given: dict[tuple[int, int], float] = {}  # stamp -> when it was given
        self._command, self._commanded = BRAKING, time.monotonic()
        self._count, self._before = 0, time.monotonic()
        random = np.random.default_rng(0)
        small = random.integers(40, 140, (9, 16, 3), np.uint8)
        self._world = np.ascontiguousarray(np.kron(small, np.ones((8, 8, 1), np.uint8)))
        publish, hear = self.create_publisher, self.create_subscription
        self._clock_topic = publish(Clock, '/clock', 10) if is_simulated else None
        self._images = {n: publish(Image, f'camera/{n}', 10) for n in CAMERAS}
        self._odometry = publish(Odometry, 'odometry', 10)
        self._route = publish(Path, 'route', LATCHED)
        self._order = publish(String, 'command', 10)
        self.publish_route()
        hear(JointState, 'vehicle_command', self._on_command, QoSProfile(depth=20))
        hear(String, 'safety_state', self._on_state, LATCHED)
        hear(DiagnosticArray, '/diagnostics', self._on_diagnostics, 50)
        for name in ('view_router', 'driver', 'controller'):
            hear(Header, f'{name}/heartbeat', self._listener(name), SENSOR)
        self.create_timer(TICK_S, self._tick)

    # ---- sensors ----

    def publish_route(self, points=None) -> None:
        """Publish the road, or other points in its place."""
        if points is None:
            points = np.stack(circle(np.arange(0.0, ROUTE_M, 5.0)), 1)
        stamp = conversions.to_stamp(0.0)
        if len(points) < 2:
            self._route.publish(Path(header=Header(frame_id='map')))
        else:
            self._route.publish(conversions.polyline_to_msg(points, stamp, 'map'))

    def _tick(self) -> None:
        now = time.monotonic()
        passed, self._before = min(now - self._before, 0.5), now
        if self.is_paused:
            return
        self._drive(now, passed)
        stamp = conversions.to_stamp(time.time() + self.offset)
        if self._clock_topic is not None:
            self._clock_topic.publish(Clock(clock=stamp))
        ego = EgoState(x=self.x, y=self.y, yaw=self.yaw, speed=self.speed)
        msg = self.change_odometry(conversions.ego_to_msg(ego, stamp, 'map', 'ego_vehicle'))
        if msg is not None:
            self._odometry.publish(msg)
        self._count += 1
        if self._count % 2:
            return
        self._order.publish(String(data='follow'))
        picture = np.roll(self._world, self._count % 64, axis=1)
        for name in reversed(CAMERAS):
            made = images.image_to_msg(picture, stamp, name)
            for sent in self.change.get(name, lambda msg: [msg])(made):
                if name == CAMERAS[0]:
                    key = (sent.header.stamp.sec, sent.header.stamp.nanosec)
                    self._given.setdefault(key, now)
                self._images[name].publish(sent)

    # ---- what is heard ----

    def _on_command(self, msg: JointState, info) -> None:
        left = time.monotonic() - max(0.0, 1e-9 * (time.time_ns() - info['source_timestamp']))
        try:
            command = command_from_joint_state(msg)
        except ValueError:
            command = None
        seen = self._given.get((msg.header.stamp.sec, msg.header.stamp.nanosec))
        age = None if seen is None else left - seen - self._paused_between(seen, left)
        with self.lock:
            self.heard.append(Heard(left=left, command=command, age=age))
        if command is not None:
            self._command, self._commanded = command, time.monotonic()

    def _paused_between(self, start: float, end: float) -> float:
        return sum(max(0.0, min(end, to) - max(start, since)) for since, to in self.pauses)

    def _on_state(self, msg: String) -> None:
        with self.lock:
            self.states.append((time.monotonic(), msg.data))

    def _on_diagnostics(self, msg: DiagnosticArray) -> None:
        for status in msg.status:
            if status.level != DiagnosticStatus.OK:
                with self.lock:
                    said = f'{status.name}: {status.message}'
                    self.complaints.append((time.monotonic(), said))

    def _listener(self, name: str):
        def beat(msg: Header):
            if msg.frame_id == 'active':
                self.beats[name] = time.monotonic()

        return beat

    # ---- the body ----

    def _drive(self, now: float, dt: float) -> None:
        command = self._command
        if now - self._commanded > OWN_TIMEOUT_S:
            if command is not BRAKING:
                self.timeouts.append(now)
            command = self._command = BRAKING
        model = METADRIVE
        push = model.throttle_gain * command.throttle
        push -= min(model.brake_gain * command.brake, model.max_deceleration)
        before, self.speed = self.speed, max(0.0, self.speed + push * dt)
        wheel = command.steer * model.max_steer
        slip = math.atan(model.rear_axle / model.wheelbase * math.tan(wheel))
        metres = 0.5 * (before + self.speed) * dt
        self.x += metres * math.cos(self.yaw + slip)
        self.y += metres * math.sin(self.yaw + slip)
        self.yaw += metres / model.rear_axle * math.sin(slip)
        self.driven += metres

    def noticed(self, began: float, known: set[str]) -> list[tuple[float, str]]:
        """Return what nodes have complained of since then that was not known before."""
        with self.lock:
            return [one for one in self.complaints if one[0] > began and one[1] not in known]

    @property
    def beside(self) -> float:
        """Return how far beside the middle of the road the car is, in m."""
        return abs(math.hypot(self.x, self.y - RADIUS) - RADIUS)


def late(ticks: int):
    """Return a change of a camera's messages that sends each so many pictures later."""
    waiting: deque = deque()

    def change(msg):
        waiting.append(msg)
        return [waiting.popleft()] if len(waiting) > ticks else []

    return change


def same(is_new_stamp: bool):
    """Return a change that sends the first picture again and again, with its stamp or with new ones."""
    first: list = []

    def change(msg):
        if not first:
            first.append(msg)
        elif is_new_stamp:
            first[0].header.stamp = msg.header.stamp
        return [first[0]]

    return change


def shifted(stamp: Time, seconds: float) -> Time:
    """Return another moment."""
    return conversions.to_stamp(conversions.seconds(stamp) + seconds)

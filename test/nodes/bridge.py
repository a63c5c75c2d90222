"""CARLA's side of the interface without CARLA: a vehicle on the topics, types and QoS of ros-bridge or of the native ROS 2.

Written after carla-simulator/ros-bridge (e9063d97), carla-simulator/carla and carla-simulator/leaderboard, as summed up in
docs/carla.md. Time is simulated: a tick of 0.05 s comes when the last one has been answered, at the latest after a second, which
is what the bridge does in synchronous mode. The vehicle is `agents.stand_in.Lincoln`.
"""

import array
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
from geometry_msgs.msg import PoseStamped
from nav_msgs.msg import Odometry, Path
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, Image, Imu, NavSatFix
from std_msgs.msg import Bool, Float32

from agents import stand_in
from mose_ros.core import carla, rig
from mose_ros.core.control import VehicleModel
from mose_ros.core.types import EgoState
from mose_ros.nodes import conversions, images

RELIABLE = QoSProfile(depth=10)
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
TICK_S = 0.05
SIZE = (64, 36)
START = 12.0  # s of simulated time, of the first episode


class Bridge(Node):
    """One ego vehicle on a straight road to the east; `flavour`: bridge, native or leaderboard."""

    def __init__(self, context, role, flavour, control, topic, read, plan=Path):
        """`control`, `topic`: type and name of the command that is heard; `read(msg)`: throttle, steer, brake of it.

        `plan`: type of the Leaderboard's route: Path, or CarlaRoute as in Bench2Drive's copy.
        """
        super().__init__(f'carla_{flavour}', context=context)
        self.flavour, self.role, self._read = flavour, role, read
        self.car = stand_in.Lincoln(
            SimpleNamespace(
                location=SimpleNamespace(x=40.0, y=-6.0), rotation=SimpleNamespace(yaw=0.0)
            ),
            noise=5e-6 if flavour == 'leaderboard' else 0.0,
        )
        self.begin(START)
        self.has_speed = True
        prefix, publish = f'/carla/{role}', self.create_publisher
        self._clock_topic = publish(Clock, '/clock', RELIABLE)
        self._cameras = {
            name: (
                publish(Image, f'{prefix}/rgb_{name}/image', RELIABLE),
                publish(CameraInfo, f'{prefix}/rgb_{name}/camera_info', RELIABLE),
            )
            for name in rig.CAMERAS
        }
        self._gnss = publish(NavSatFix, f'{prefix}/gnss', RELIABLE)
        self._imu = publish(Imu, f'{prefix}/imu', RELIABLE)
        if flavour == 'bridge':
            self._odometry = publish(Odometry, f'{prefix}/odometry', RELIABLE)
        if flavour != 'native':
            self._speed = publish(Float32, f'{prefix}/speedometer', RELIABLE)
        name = 'waypoints' if flavour == 'bridge' else 'global_plan'
        self._route = publish(plan, f'{prefix}/{name}', LATCHED)
        self.ready = threading.Event()
        if flavour == 'leaderboard':
            self.create_subscription(
                Bool, f'{prefix}/status', lambda msg: self.ready.set(), LATCHED
            )
        self.create_subscription(control, topic, self._on_control, QoSProfile(depth=1))
        self._answered = threading.Event()
        self._stop = threading.Event()
        self._command = SimpleNamespace(throttle=0.0, steer=0.0, brake=0.0)

    def begin(self, start: float) -> None:
        """Begin an episode at that time; the vehicle stays where it is, at rest."""
        self.start, self.time, self.ticks = start, start, 0
        self.car.speed = 0.0
        self.answers: dict[int, list] = {}  # tick -> the commands that came with its stamp
        self.strays: list = []  # commands whose stamp is no tick's
        self.odometry: list[EgoState] = []  # the true ones

    # ---- hearing ----

    def _on_control(self, msg) -> None:
        self._command = SimpleNamespace(
            **dict(zip(('throttle', 'steer', 'brake'), self._read(msg), strict=True))
        )
        header = getattr(msg, 'header', None)
        if header is None:
            self.answers.setdefault(self.ticks, []).append(self._command)
            self._answered.set()
            return
        off = conversions.seconds(header.stamp) - self.start
        tick = round(off / TICK_S)
        if abs(off - tick * TICK_S) > 1e-3:
            self.strays.append(msg)
        self.answers.setdefault(tick, []).append(self._command)
        if tick == self.ticks:
            self._answered.set()

    # ---- the world ----

    def publish_route(self) -> None:
        """Publish the way ahead once, latched, as its publisher does."""
        msg = self._route.msg_type()
        for x in (40, 60, 120, 300) if self.flavour == 'leaderboard' else range(40, 300):
            pose = PoseStamped()
            pose.pose.position.x, pose.pose.position.y = float(x), 6.0
            msg.poses.append(pose if isinstance(msg, Path) else pose.pose)
        if isinstance(msg, Path):
            msg.header.frame_id = 'map'
        else:
            msg.road_options = [4, 1, 4, 4]  # CARLA's numbers: left, from 60 m to 120 m
        self._route.publish(msg)

    def drive(self, metres: float, wall_s: float, limit_s: float = 1.0) -> float:
        """Tick until the car has driven so far or the time is over; return how far. `limit_s`: to wait for one answer."""
        deadline, begin = time.monotonic() + wall_s, self.car.x
        while self.car.x - begin < metres and time.monotonic() < deadline:
            self.step(limit_s)
        return self.car.x - begin

    def step(self, limit_s: float = 1.0) -> bool:
        """Publish one tick, wait for its answer, drive it; say whether the answer came."""
        self._answered.clear()
        self._say()
        came = self._answered.wait(limit_s)
        self.car.apply(self._command)
        self.ticks += 1
        self.time = self.start + self.ticks * TICK_S
        return came

    def _say(self) -> None:
        stamp, car = conversions.to_stamp(self.time), self.car
        self._clock_topic.publish(Clock(clock=stamp))
        x, y, yaw = carla.pose(car.x, car.y, math.degrees(car.yaw))
        ego = EgoState(x=x, y=y, yaw=yaw, speed=car.speed, yaw_rate=-car.rate)
        self.odometry.append(ego)
        self._say_imu(stamp)
        (latitude, longitude, _), frame = car.data()['gnss'][1], f'{self.role}/gnss'
        if self.flavour == 'native':  # 0.9.16: the latitude grows to the south
            latitude = 2 * stand_in.ORIGIN[0] - latitude
            frame = 'gnss'
        fix = NavSatFix(latitude=latitude, longitude=longitude)
        fix.header.stamp, fix.header.frame_id = stamp, frame
        self._gnss.publish(fix)
        if self.flavour != 'native' and self.has_speed:
            self._speed.publish(Float32(data=float(car.speed)))
        if self.flavour == 'bridge':
            self._odometry.publish(conversions.ego_to_msg(ego, stamp, 'map', self.role))
        for name in reversed(rig.CAMERAS):
            picture, info = self._cameras[name]
            frame = f'{self.role}/rgb_{name}'
            picture.publish(bgra8(90, stamp, frame))
            info.publish(images.camera_info_to_msg(rig.camera(name), *SIZE, stamp, frame))

    def _say_imu(self, stamp) -> None:
        car, msg = self.car, Imu()
        compass = car.yaw + math.pi / 2
        is_native = self.flavour == 'native'
        msg.header.stamp = stamp
        msg.header.frame_id = 'imu' if is_native else f'{self.role}/imu'
        msg.orientation = conversions.quaternion(
            math.pi / (4 if is_native else 2)
            - compass  # CarlaIMUPublisher.cpp; ros-bridge's imu.py
        )
        msg.angular_velocity.z = car.rate if is_native else -car.rate
        msg.linear_acceleration.x = car.acceleration
        self._imu.publish(msg)


def bgra8(brightness: int, stamp, frame: str) -> Image:
    """Fill a picture as CARLA's cameras come: four bytes a pixel."""
    width, height = SIZE
    msg = Image(width=width, height=height, encoding='bgra8', step=4 * width)
    msg.header.stamp, msg.header.frame_id = stamp, frame
    msg.data = array.array('B', np.full(4 * width * height, brightness, np.uint8).tobytes())
    return msg


def of_carla(msg) -> tuple[float, float, float]:
    """Return throttle, steer and brake of a CarlaEgoVehicleControl."""
    return msg.throttle, msg.steer, msg.brake


def of_twist(msg) -> tuple[float, float, float]:
    """Do as carla_twist_to_control does."""
    if msg.linear.x == 0 and msg.angular.z == 0:
        return 0.0, 0.0, 1.0
    assert msg.linear.x > 0, 'this would be driven in reverse'
    steer = -msg.angular.z / carla.WHEEL_ANGLE
    return min(msg.linear.x, 10.0) / 10.0, max(-1.0, min(1.0, steer)), 0.0


def of_ackermann(model: VehicleModel):
    """Return what stands in for CARLA's own controller of Ackermann commands: acceleration to pedals."""

    def read(msg) -> tuple[float, float, float]:
        drive = msg.drive
        throttle = max(0.0, drive.acceleration / model.throttle_gain)
        brake = max(0.0, -drive.acceleration / model.brake_gain)
        return throttle, -drive.steering_angle / carla.WHEEL_ANGLE, brake

    return read

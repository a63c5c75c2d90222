"""A VehicleCommand in the words of each vehicle that we can drive: the controller's backends.

    backend            message                               topic (relative to the namespace, or CARLA's)
    sim                sensor_msgs/JointState                vehicle_command
    carla              carla_msgs/CarlaEgoVehicleControl     /carla/<role>/vehicle_control_cmd
    ackermann          ackermann_msgs/AckermannDrive         /carla/<role>/ackermann_cmd, by carla_ackermann_control
    ackermann_stamped  ackermann_msgs/AckermannDriveStamped  /carla/<role>/ackermann_control_cmd, by CARLA's native ROS 2
    twist              geometry_msgs/Twist                   /carla/<role>/twist, by carla_twist_to_control
    auto               the first of carla, ackermann, twist whose package is installed

Why JointState for our own simulator: of the messages that every ROS has, it is the stamped one whose values carry their names,
so that `ros2 topic echo` explains itself: name [steer, throttle, brake], position [-1..1 left, 0..1, 0..1].
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from builtin_interfaces.msg import Time
from geometry_msgs.msg import Twist
from sensor_msgs.msg import JointState
from std_msgs.msg import Header

from mose_ros.core.control import VehicleModel
from mose_ros.core.types import VehicleCommand

BACKENDS = ('sim', 'auto', 'carla', 'ackermann', 'ackermann_stamped', 'twist')
BEST_FIRST = ('carla', 'ackermann', 'twist')  # what ros-bridge understands
ACTUATORS = ('steer', 'throttle', 'brake')
COASTING_MPS = (
    0.01  # carla_twist_to_control: throttle is min(linear.x, 10) / 10, all zero is a full brake
)
BRAKE_DEAD_BAND = 0.02
PACKAGES = {'carla_msgs': 'ros-carla-msgs', 'ackermann_msgs': 'ros-$ROS_DISTRO-ackermann-msgs'}


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Where the commands go, and how they are filled: to_msg(command, speed, stamp)."""

    name: str
    topic: str
    kind: type
    to_msg: Callable[[VehicleCommand, float, Time], Any]


def open_backend(
    name: str, role: str, model: VehicleModel, wheel_angle: float = 0.0, topic: str = ''
) -> Backend:
    """Return a backend; ValueError for an unknown one or one whose message package is not installed.

    `wheel_angle`: rad that ackermann and twist ask for at steer 1, which is what the receiver divides by; 0: the model's.
    `topic`: where the commands go instead of the backend's own.
    """
    if name not in BACKENDS:
        raise ValueError(f'unknown control backend {name!r}; choose one of {", ".join(BACKENDS)}')
    if name == 'auto':
        for one in BEST_FIRST[:-1]:
            try:
                return open_backend(one, role, model, wheel_angle, topic)
            except ValueError:  # its package is not installed
                continue
        return open_backend(BEST_FIRST[-1], role, model, wheel_angle, topic)
    backend = _backend(name, role, model, wheel_angle or model.max_steer)
    return replace(backend, to_msg=_checked(backend.to_msg), topic=topic or backend.topic)


def _backend(name: str, role: str, model: VehicleModel, angle: float) -> Backend:
    if name == 'sim':
        return Backend(name=name, topic='vehicle_command', kind=JointState, to_msg=joint_state)
    if name == 'twist':
        return Backend(
            name=name, topic=f'/carla/{role}/twist', kind=Twist, to_msg=TwistPulses(angle)
        )
    if name == 'carla':
        kind = _message(name, 'carla_msgs', 'CarlaEgoVehicleControl')
        return Backend(
            name=name,
            topic=f'/carla/{role}/vehicle_control_cmd',
            kind=kind,
            to_msg=lambda command, _, stamp: carla_control(kind, command, stamp),
        )
    drive = _message(name, 'ackermann_msgs', 'AckermannDrive')
    if name == 'ackermann':
        return Backend(
            name=name,
            topic=f'/carla/{role}/ackermann_cmd',
            kind=drive,
            to_msg=lambda command, speed, _: ackermann(drive, command, speed, model, angle),
        )
    stamped = _message(name, 'ackermann_msgs', 'AckermannDriveStamped')

    def to_msg(command: VehicleCommand, speed: float, stamp: Time):
        inner = ackermann(drive, command, speed, model, angle)
        return stamped(header=Header(stamp=stamp, frame_id=role), drive=inner)

    return Backend(
        name=name, topic=f'/carla/{role}/ackermann_control_cmd', kind=stamped, to_msg=to_msg
    )


def joint_state(command: VehicleCommand, speed: float, stamp: Time) -> JointState:
    """Fill the simulator's command."""
    values = [float(getattr(command, name)) for name in ACTUATORS]
    return JointState(header=Header(stamp=stamp), name=list(ACTUATORS), position=values)


def command_from_joint_state(msg: JointState) -> VehicleCommand:
    """Read the simulator's command; ValueError unless it is complete, finite and within its ranges."""
    if sorted(msg.name) != sorted(ACTUATORS) or len(msg.position) != len(ACTUATORS):
        raise ValueError(f'a command has {", ".join(ACTUATORS)}, not {list(msg.name)[:5]}')
    command = VehicleCommand(**dict(zip(msg.name, msg.position, strict=True)))
    check_command(command)
    return command


def check_command(command: VehicleCommand) -> None:
    """Raise ValueError unless an actuator can take it: finite and within its ranges."""
    for name in ACTUATORS:
        value, low = getattr(command, name), -1.0 if name == 'steer' else 0.0
        if not low <= value <= 1.0:  # NaN neither
            raise ValueError(f'{name} {value} is not in {low:.0f}..1')


def _checked(to_msg: Callable) -> Callable:
    """Let nothing out that no actuator could take."""

    def to_checked_msg(command: VehicleCommand, speed: float, stamp: Time):
        check_command(command)
        if not math.isfinite(speed):
            raise ValueError(f'a command at a speed of {speed} m/s')
        return to_msg(command, speed, stamp)

    return to_checked_msg


def carla_control(kind: type, command: VehicleCommand, stamp: Time):
    """Fill CARLA's own control; its steering is positive to the right."""
    msg = kind()
    msg.header.stamp = stamp
    msg.steer = -float(command.steer)
    msg.throttle, msg.brake = float(command.throttle), float(command.brake)
    return msg


def ackermann(
    kind: type, command: VehicleCommand, speed: float, model: VehicleModel, wheel_angle: float
):
    """Fill an Ackermann drive: wheel angle to the left, and the speed that this acceleration gives in a second."""
    acceleration = model.throttle_gain * command.throttle - model.brake_gain * command.brake
    acceleration = max(acceleration, -model.max_deceleration)
    msg = kind()
    msg.steering_angle = float(command.steer * wheel_angle)
    msg.speed = float(max(0.0, speed + acceleration))
    msg.acceleration = float(acceleration)
    return msg


class TwistPulses:
    """Fill what carla_twist_to_control understands: throttle as linear.x / 10, the wheel angle as angular.z.

    Its only brake is the all-zero twist, which brakes fully; a softer brake is given as pulses of it, as many of the
    messages as the brake is strong.
    """

    def __init__(self, wheel_angle: float):
        self._wheel_angle = wheel_angle
        self._debt = 0.0

    def __call__(self, command: VehicleCommand, speed: float, stamp: Time) -> Twist:
        self._debt = self._debt + command.brake if command.brake > BRAKE_DEAD_BAND else 0.0
        if self._debt >= 1.0 or command.brake >= 0.99:
            self._debt = max(0.0, self._debt - 1.0)
            return Twist()
        msg = Twist()
        msg.linear.x = max(10.0 * float(command.throttle), COASTING_MPS)
        msg.angular.z = float(command.steer * self._wheel_angle)
        return msg


def _message(backend: str, module: str, name: str) -> type:
    """Return a message class of a package that not every machine has."""
    try:
        return getattr(importlib.import_module(f'{module}.msg'), name)
    except ImportError:
        raise ValueError(
            f"control backend '{backend}' needs {module}, which is not installed: install "
            f"{PACKAGES[module]}, or choose another backend (for CARLA alone, 'twist' needs nothing)"
        ) from None

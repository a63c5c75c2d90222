"""One command in the words of each vehicle."""

import math
import sys
import types

import pytest
from builtin_interfaces.msg import Time
from sensor_msgs.msg import JointState

from mose_ros.core.control import METADRIVE
from mose_ros.core.types import VehicleCommand
from mose_ros.nodes import vehicle_command as words

LEFT = VehicleCommand(steer=0.5, throttle=0.3, brake=0.0)
BRAKE = VehicleCommand(steer=0.0, throttle=0.0, brake=0.4)
NOW = Time(sec=5)


def look_alike(**fields):
    """Return a class with the fields of a message package that is not installed here."""
    return lambda: types.SimpleNamespace(header=types.SimpleNamespace(stamp=None), **fields)


def test_commands_go_to_the_backends_topic_or_to_ones_own():
    assert words.open_backend('twist', 'hero', METADRIVE).topic == '/carla/hero/twist'
    for name in ('twist', 'auto'):
        assert words.open_backend(name, 'hero', METADRIVE, topic='/dbw').topic == '/dbw'


def test_the_simulators_command_comes_back_as_it_was_sent():
    backend = words.open_backend('sim', 'ego_vehicle', METADRIVE)
    msg = backend.to_msg(LEFT, 3.0, NOW)
    assert words.command_from_joint_state(msg) == LEFT != BRAKE
    assert msg.header.stamp == NOW and msg.name == ['steer', 'throttle', 'brake']


@pytest.mark.parametrize(
    ('name', 'position'),
    [
        (['steer', 'throttle'], [0.0, 0.0]),
        (['steer', 'throttle', 'brake'], [0.0, 0.0]),
        (['steer', 'throttle', 'brake'], [0.0, math.nan, 0.0]),
        (['steer', 'throttle', 'brake'], [1.5, 0.0, 0.0]),
        (['steer', 'throttle', 'brake'], [0.0, -0.1, 0.0]),
        ([], []),
    ],
)
def test_commands_that_no_actuator_takes_are_refused(name, position):
    with pytest.raises(ValueError):
        words.command_from_joint_state(JointState(name=name, position=position))


def test_carla_steers_to_the_right():
    msg = words.carla_control(look_alike(steer=0.0, throttle=0.0, brake=0.0), LEFT, NOW)
    assert (msg.steer, msg.throttle, msg.brake, msg.header.stamp) == (-0.5, 0.3, 0.0, NOW)


def test_ackermann_asks_for_wheel_angle_speed_and_acceleration():
    kind = look_alike(steering_angle=0.0, speed=0.0, acceleration=0.0)
    msg = words.ackermann(kind, LEFT, 3.0, METADRIVE, 1.2)
    assert msg.steering_angle == pytest.approx(0.5 * 1.2)
    assert msg.acceleration == pytest.approx(0.3 * METADRIVE.throttle_gain)
    assert msg.speed == pytest.approx(3.0 + msg.acceleration)
    assert words.ackermann(kind, BRAKE, 3.0, METADRIVE, 1.2).speed == 0.0


def test_twist_drives_by_tenths_and_brakes_by_pulses():
    to_msg = words.open_backend('twist', 'ego_vehicle', METADRIVE).to_msg
    msg = to_msg(LEFT, 3.0, NOW)
    assert msg.linear.x == pytest.approx(3.0)
    assert msg.angular.z == pytest.approx(0.5 * METADRIVE.max_steer)
    nominal = words.open_backend('twist', 'ego_vehicle', METADRIVE, wheel_angle=1.2).to_msg
    assert nominal(LEFT, 3.0, NOW).angular.z == pytest.approx(
        0.5 * 1.2
    )  # the bridge divides by it
    pulses = [to_msg(BRAKE, 3.0, NOW) for _ in range(100)]
    full = [one for one in pulses if one.linear.x == 0 and one.angular.z == 0]
    assert len(full) == pytest.approx(40, abs=1)
    assert all(one.linear.x >= 0 for one in pulses)  # below zero it would reverse
    assert to_msg(VehicleCommand(steer=0.3, throttle=0.0, brake=1.0), 3.0, NOW).angular.z == 0


def test_backends_that_are_not_installed_say_what_to_install():
    with pytest.raises(ValueError, match='unknown control backend'):
        words.open_backend('hovercraft', 'ego_vehicle', METADRIVE)
    for name, module in {'carla': 'carla_msgs', 'ackermann': 'ackermann_msgs'}.items():
        try:
            __import__(module)
        except ImportError:
            with pytest.raises(ValueError, match=f'needs {module}'):
                words.open_backend(name, 'ego_vehicle', METADRIVE)
        else:
            assert words.open_backend(name, 'hero', METADRIVE).topic.startswith('/carla/hero/')


# ---- with the true message classes ----


def test_true_messages_carry_the_command(vehicle_messages):
    carla = words.open_backend('carla', 'hero', METADRIVE)
    msg = carla.to_msg(LEFT, 3.0, NOW)
    assert (msg.steer, msg.header.stamp) == (-0.5, NOW)
    assert msg.throttle == pytest.approx(0.3) and msg.brake == 0.0
    assert not (msg.hand_brake or msg.reverse or msg.manual_gear_shift)
    assert carla.topic == '/carla/hero/vehicle_control_cmd'

    bridge = words.open_backend('ackermann', 'hero', METADRIVE, wheel_angle=1.2)
    assert bridge.topic == '/carla/hero/ackermann_cmd' and not hasattr(bridge.kind, 'header')
    assert bridge.to_msg(LEFT, 3.0, NOW).steering_angle == pytest.approx(0.6)

    native = words.open_backend('ackermann_stamped', 'hero', METADRIVE, wheel_angle=1.2)
    msg = native.to_msg(LEFT, 3.0, NOW)
    assert native.topic == '/carla/hero/ackermann_control_cmd' and msg.header.stamp == NOW
    assert msg.drive.steering_angle == pytest.approx(0.6)
    assert msg.drive.speed == pytest.approx(3.0 + 0.3 * METADRIVE.throttle_gain)


def test_auto_takes_the_best_that_is_installed(vehicle_messages, monkeypatch):
    def without(*missing):
        for module in missing:
            monkeypatch.setitem(sys.modules, f'{module}.msg', None)  # None blocks the import
        return words.open_backend('auto', 'ego_vehicle', METADRIVE).name

    assert without() == 'carla'
    assert without('carla_msgs') == 'ackermann'
    assert without('carla_msgs', 'ackermann_msgs') == 'twist'

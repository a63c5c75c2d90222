"""One car between plan and actuators: what it does while all is well, when something is wrong, and after."""

import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest

from mose_ros.core.control import METADRIVE
from mose_ros.core.controller import Caution, Controller
from mose_ros.core.safety import Fault, Severity, State
from mose_ros.core.types import EgoState, Trajectory, VehicleCommand

PERIOD = 0.1


def plan(time, speed=8.0):
    return Trajectory(
        time=time, dt=0.2, xy=np.array([[0.2 * speed * k, 0.0] for k in range(1, 16)])
    )


class Car:
    """A car on a straight road that does what it is told."""

    def __init__(self, speed=8.0, **caution):
        self.controller = Controller(METADRIVE, PERIOD, Caution(**caution))
        self.now, self.x, self.speed = 0.0, 0.0, speed

    def step(self, others=(), plans=True, odometry=True, wanted=None, wrong=None):
        """Hear what comes, answer, and move for one period; `wanted`: the speed of the plan, in m/s.

        `wrong`: what the odometry says instead of the truth; what is then refused is no error.
        """
        with contextlib.nullcontext() if wrong is None else contextlib.suppress(ValueError):
            if odometry:
                ego = EgoState(x=self.x, y=0.0, yaw=0.0, speed=self.speed)
                ego = replace(ego, **wrong or {})
                self.controller.hear_odometry(self.now, ego, 0.0, self.now)
            if plans:
                asked = self.speed if wanted is None else wanted
                self.controller.hear_plan(plan(self.now, asked), 0.0, self.now)
        command = self.controller.command(self.now, others)
        force = command.throttle * METADRIVE.throttle_gain - command.brake * METADRIVE.brake_gain
        self.speed = max(0.0, self.speed + force * PERIOD)
        self.x += self.speed * PERIOD
        self.now += PERIOD
        return command

    def steps(self, seconds, **what):
        return [self.step(**what) for _ in range(round(seconds / PERIOD))]

    @property
    def state(self):
        return self.controller.state


def test_it_waits_at_rest_then_follows_the_plan():
    car = Car(speed=0.0)
    [*_, command] = car.steps(0.5, plans=False)
    assert car.state is State.STOPPED and not car.controller.is_emergency
    assert command.throttle == 0 and command.brake == METADRIVE.hold_brake
    assert car.controller.plan_age(car.now) is None
    [*_, command] = car.steps(0.5, wanted=2.0)
    assert car.state is State.NORMAL and command.throttle > 0.5
    assert car.controller.plan_age(car.now) == pytest.approx(PERIOD)


@pytest.mark.parametrize('missing', ['plans', 'odometry'])
def test_what_no_longer_comes_is_driven_without_for_a_moment_then_braked_for(missing):
    car = Car()
    car.steps(1.0)
    states = []
    for _ in range(40):
        car.step(plans=False, odometry=missing != 'odometry')
        states.append(car.state)
    order = list(dict.fromkeys(states))
    assert order == [
        State.NORMAL,
        State.DEGRADED,
        State.COMFORTABLE_STOP,
        State.EMERGENCY_STOP,
        State.STOPPED,
    ]
    assert car.speed < 0.2 and missing[:4] in car.controller.reason.replace('trajectory', 'plan')
    car.steps(2.0)
    assert car.state is State.NORMAL


def test_the_fault_of_another_stops_the_car_until_it_is_gone():
    car = Car()
    car.steps(1.0)
    fault = Fault(severity=Severity.STOP, reason='the bonnet is open')
    first, *_ = car.steps(0.5, others=[fault])
    assert first.brake * METADRIVE.brake_gain >= Caution().comfortable_deceleration - 1e-9
    assert car.state is State.COMFORTABLE_STOP and car.controller.reason == 'the bonnet is open'
    car.steps(0.5)
    assert car.state is State.NORMAL and car.speed > 4.0
    car.steps(0.3, others=[replace(fault, severity=Severity.EMERGENCY)])
    assert car.state is State.EMERGENCY_STOP


def test_a_plan_that_no_car_could_drive_is_refused_and_the_last_one_followed():
    car = Car()
    car.steps(1.0)
    car.step(plans=False)
    with pytest.raises(ValueError, match='begins 10'):
        car.controller.hear_plan(plan(car.now - PERIOD, 60.0), 0.0, car.now)
    car.step(plans=False)
    assert car.state is State.DEGRADED and 'begins 10' in car.controller.reason
    car.steps(0.6)
    assert car.state is State.NORMAL
    car.controller.refuse_plan('it is a poem')
    car.step(plans=False)
    assert car.controller.reason == 'refused: it is a poem'


def test_caution_may_change_on_the_way():
    fast = plan(0.0, 20.0)
    car = Car(speed=20.0)
    car.step(plans=False)
    car.controller.hear_plan(fast, 0.05, 0.05)
    caution = car.controller.caution
    car.controller.caution = replace(caution, limits=replace(caution.limits, speed=10.0))
    with pytest.raises(ValueError, match='over 10'):
        car.controller.hear_plan(replace(fast, time=0.05), 0.0, 0.05)


def test_odometry_that_jumps_is_a_fault_until_a_good_one_comes():
    car = Car()
    car.steps(1.0)
    with pytest.raises(ValueError, match='jumps by 50'):
        ego = EgoState(x=car.x + 50.0, y=0.0, yaw=0.0, speed=car.speed)
        car.controller.hear_odometry(car.now, ego, 0.0, car.now)
    assert [one.severity for one in car.controller.faults(car.now)] == [Severity.STOP]
    car.controller.command(car.now)
    assert car.state is State.COMFORTABLE_STOP and math.isfinite(car.controller.speed)


@pytest.mark.parametrize(
    ('wrong', 'words'),
    [({'x': 0.0, 'speed': 0.0}, 'has not moved at all'), ({'speed': 0.0}, 'one of them is wrong')],
)
def test_odometry_that_is_dead_from_standstill_does_not_let_the_car_run_away(wrong, words):
    car = Car(speed=0.0)
    car.steps(0.5, plans=False)
    speeds, reasons = [], []
    for _ in range(50):
        car.step(wanted=2.0, wrong=wrong)
        speeds.append(car.speed)
        reasons.append(car.controller.reason)
    assert max(speeds) < 3.0 and speeds[-1] == 0.0 and any(words in one for one in reasons)
    car.steps(6.0, wanted=2.0, wrong={})  # mended
    assert car.state is State.NORMAL and car.speed > 1.0


def test_who_only_believes_that_the_car_stands_brakes_as_hard_as_before():
    car = Car()
    car.steps(1.0)
    commands = car.steps(4.0, plans=False, odometry=False)
    assert car.state is State.STOPPED and commands[-1].brake > 0.4
    assert car.step(plans=False).brake == METADRIVE.hold_brake  # now it knows


def test_what_it_leaves_behind_is_a_full_brake():
    car = Car()
    car.steps(1.0)
    assert car.step().brake < 0.1
    assert car.controller.leave() == VehicleCommand(steer=0.0, throttle=0.0, brake=1.0)
    assert Car(speed=0.0).controller.leave().brake == 1.0  # before anything was heard

"""Where the car is on its last plan: while odometry comes, after it has failed, and when it comes back elsewhere."""

import math

import numpy as np
import pytest

from mose_ros.core.control import TrajectoryTracker
from mose_ros.core.pursuit import Pursuit
from mose_ros.core.safety import TrajectoryLimits
from mose_ros.core.types import EgoState, Trajectory

LIMITS, TIMEOUT = TrajectoryLimits(), 0.22
STAMPS = 1000.0  # the stamps' clock is ahead of the steady one by so much


def ahead(time, speed=8.0):
    return Trajectory(
        time=time, dt=0.2, xy=np.array([[0.2 * speed * k, 0.0] for k in range(1, 16)])
    )


def driving(until, pursuit=None, yaw=0.5, speed=8.0):
    """Return a pursuit of a plan of its start by a car that has driven straight on since, with odometry at 10 Hz."""
    pursuit = pursuit or Pursuit(max_jump_m=1.0)
    for k in range(round(until / 0.1) + 1):
        now = 0.1 * k
        tell(
            pursuit,
            now,
            5.0 + speed * now * math.cos(yaw),
            speed * now * math.sin(yaw),
            yaw,
            speed,
        )
        if k == 0:
            pursuit.hear_plan(ahead(STAMPS, speed), 0.05, now + 0.05, LIMITS, 0.3)
    return pursuit


def tell(pursuit, now, x, y, yaw=0.5, speed=8.0):
    ego = EgoState(x=x, y=y, yaw=yaw, speed=speed)
    return pursuit.hear_odometry(STAMPS + now, ego, 0.0, now)


def move_on(pursuit, now, deceleration=0.0):
    pursuit.move_on(now, TIMEOUT, deceleration, TrajectoryTracker().roll)


def test_the_pose_is_that_of_now_though_odometry_is_older():
    pursuit = driving(0.5)
    move_on(pursuit, 0.58)
    assert not pursuit.is_blind and pursuit.pose == pytest.approx((8.0 * 0.58, 0.0, 0.0), abs=1e-6)
    assert pursuit.plan_age(0.58) == pytest.approx(0.58)


def test_without_odometry_it_moves_as_commanded():
    pursuit = driving(0.5)
    for k in range(51, 100):
        move_on(pursuit, 0.01 * k, deceleration=4.0)
    assert pursuit.is_blind
    since = 0.99 - 0.72  # when it was given up
    assert pursuit.speed == pytest.approx(8.0 - 4.0 * since, abs=0.1)
    assert pursuit.pose[0] == pytest.approx(8.0 * 0.99 - 0.5 * 4.0 * since**2, abs=0.1)
    for k in range(100, 400):
        move_on(pursuit, 0.01 * k, deceleration=4.0)
    assert pursuit.speed == 0.0


def test_odometry_that_comes_back_elsewhere_moves_the_plan_with_it():
    pursuit = driving(0.5)
    move_on(pursuit, 0.5)
    with pytest.raises(ValueError, match='jumps by'):
        tell(pursuit, 0.6, 100.0, 50.0, yaw=2.0)
    move_on(pursuit, 0.6)
    assert pursuit.is_blind and pursuit.pose == pytest.approx((4.8, 0.0, 0.0), abs=1e-6)
    tell(pursuit, 0.7, 100.0 + 0.8 * math.cos(2.0), 50.0 + 0.8 * math.sin(2.0), yaw=2.0)
    move_on(pursuit, 0.7)
    assert not pursuit.is_blind and pursuit.pose == pytest.approx((4.8, 0.0, 0.0), abs=1e-6)
    tell(pursuit, 0.8, 100.0 + 1.6 * math.cos(2.0), 50.0 + 1.6 * math.sin(2.0), yaw=2.0)
    move_on(pursuit, 0.8)
    assert pursuit.pose == pytest.approx((5.6, 0.0, 0.0), abs=1e-6)


def test_a_plan_that_comes_while_nobody_measures_finds_the_car_where_it_is():
    pursuit = driving(0.5)
    move_on(pursuit, 0.5)
    pursuit.lose_odometry()
    move_on(pursuit, 0.6)
    pursuit.hear_plan(ahead(STAMPS + 0.5), 0.1, 0.6, LIMITS, 0.3)
    move_on(pursuit, 0.6)
    assert pursuit.is_blind and pursuit.pose == pytest.approx((0.8, 0.0, 0.0), abs=1e-6)


def test_a_plan_on_its_way_during_a_jump_begins_where_the_odometry_is_now():
    pursuit = driving(0.5)
    move_on(pursuit, 0.5)
    with pytest.raises(ValueError, match='jumps by'):
        tell(pursuit, 0.6, 100.0, 50.0)
    tell(pursuit, 0.7, 100.0 + 0.8 * math.cos(0.5), 50.0 + 0.8 * math.sin(0.5))
    pursuit.hear_plan(ahead(STAMPS + 0.5), 0.2, 0.7, LIMITS, 0.3)  # of before the jump
    move_on(pursuit, 0.7)
    assert pursuit.pose == pytest.approx((1.6, 0.0, 0.0), abs=1e-6)


def test_what_can_not_be_read_makes_blind_at_once():
    pursuit = driving(0.5)
    pursuit.lose_odometry()
    move_on(pursuit, 0.55, deceleration=2.0)
    assert pursuit.is_blind and pursuit.pose is None  # it had never been asked where it was
    tell(pursuit, 0.6, 5.0 + 4.8 * math.cos(0.5), 4.8 * math.sin(0.5))
    move_on(pursuit, 0.6)
    assert not pursuit.is_blind and pursuit.pose == pytest.approx((4.8, 0.0, 0.0), abs=1e-6)


def test_plans_are_believed_only_with_the_odometry_of_their_moment_and_once():
    pursuit = Pursuit(max_jump_m=1.0)
    with pytest.raises(ValueError, match='no odometry of the moment'):
        pursuit.hear_plan(ahead(STAMPS), 0.05, 0.05, LIMITS, 0.3)
    pursuit = driving(0.3)
    with pytest.raises(ValueError, match='not newer'):
        pursuit.hear_plan(ahead(STAMPS), 0.05, 0.35, LIMITS, 0.3)
    with pytest.raises(ValueError, match='begins'):
        pursuit.hear_plan(ahead(STAMPS + 0.3, speed=16.0), 0.05, 0.35, LIMITS, 0.3)
    pursuit.hear_plan(ahead(STAMPS + 0.3), 0.05, 0.35, LIMITS, 0.3)
    assert pursuit.serves and pursuit.plan_age(0.4) == pytest.approx(0.1)


def test_time_that_goes_back_leaves_a_way_to_brake_on_and_no_plan_to_follow():
    pursuit = driving(0.5)
    ego = EgoState(x=5.0 + 4.8 * math.cos(0.5), y=4.8 * math.sin(0.5), yaw=0.5, speed=8.0)
    assert pursuit.hear_odometry(STAMPS - 10.0, ego, 0.0, 0.6) == pytest.approx(10.5)
    move_on(pursuit, 0.6)
    assert not pursuit.serves and pursuit.pose == pytest.approx((4.8, 0.0, 0.0), abs=1e-6)
    pursuit.hear_plan(ahead(STAMPS - 10.0), 0.0, 0.65, LIMITS, 0.3)
    assert pursuit.serves


def test_a_steady_clock_that_goes_back_is_counted_from_there():
    pursuit = driving(0.5)
    pursuit.go_back(0.1)
    assert pursuit.silence(0.1) == 0.0 and pursuit.plan_age(0.1) == pytest.approx(0.1, abs=0.06)
    move_on(pursuit, 0.1)
    assert not pursuit.is_blind

"""The tracker drives a kinematic bicycle along noisy plans, holds at rest, and refuses what is not finite."""

import numpy as np
import pytest

from mose_ros.core.control import METADRIVE, TrajectoryTracker
from mose_ros.core.types import Trajectory

DT = 0.1


class Bicycle:
    """A kinematic bicycle about the centre of the body, driven by commands."""

    def __init__(self, x=0.0, y=0.0, yaw=0.0, speed=0.0):
        self.x, self.y, self.yaw, self.speed = x, y, yaw, speed

    def step(self, command):
        wheel = command.steer * METADRIVE.max_steer
        slip = np.arctan(METADRIVE.rear_axle / METADRIVE.wheelbase * np.tan(wheel))
        push = METADRIVE.throttle_gain * command.throttle - METADRIVE.brake_gain * command.brake
        self.speed = max(0.0, self.speed + push * DT)
        self.x += self.speed * np.cos(self.yaw + slip) * DT
        self.y += self.speed * np.sin(self.yaw + slip) * DT
        self.yaw += self.speed / METADRIVE.rear_axle * np.sin(slip) * DT

    def to_ego(self, xy):
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        return (xy - (self.x, self.y)) @ np.array([[cos, -sin], [sin, cos]])


def plan(xy, time=0.0, dt=0.2):
    return Trajectory(time=time, dt=dt, xy=np.asarray(xy, float))


def follow(car, world_of, steps, noise=0.0, seed=0):
    """Drive along world_of(distance), the plan at 6 m/s from the place nearest to the car; return its track."""
    tracker, random, track = TrajectoryTracker(), np.random.default_rng(seed), []
    line = np.array([world_of(s) for s in np.arange(0, 200, 0.25)])
    steers = []
    for _ in range(steps):
        nearest = int(np.argmin(np.hypot(*(line - (car.x, car.y)).T)))
        ahead = nearest + (6.0 * 0.2 / 0.25 * np.arange(1, 16)).astype(int)
        points = car.to_ego(line[np.minimum(ahead, len(line) - 1)])
        command = tracker.command(plan(points + random.normal(0, noise, points.shape)), car.speed)
        car.step(command)
        steers.append(command.steer)
        track.append((car.x, car.y, car.speed))
    return np.array(track), np.array(steers)


def test_follows_a_circle_of_10_m_radius():
    track, _ = follow(
        Bicycle(speed=6.0), lambda s: (10 * np.sin(s / 10), 10 - 10 * np.cos(s / 10)), 100
    )
    radius = np.hypot(track[20:, 0], track[20:, 1] - 10)
    assert np.abs(radius - 10).max() < 0.3
    assert np.abs(track[40:, 2] - 6.0).max() < 0.2


def test_comes_back_from_a_metre_beside_the_line():
    track, _ = follow(Bicycle(y=1.0, yaw=0.25, speed=6.0), lambda s: (s, 0.0), 60)
    assert abs(track[-1, 1]) < 0.1
    assert np.min(track[:, 1]) > -0.4  # hardly any overshoot


def test_noise_of_a_network_stays_smooth():
    track, steers = follow(Bicycle(speed=6.0), lambda s: (s, 0.0), 150, noise=0.1)
    assert np.abs(track[:, 1]).max() < 0.25
    assert np.abs(np.diff(steers)).max() < 0.06
    assert np.abs(np.diff(track[20:, 2])).max() < 0.06  # 0.6 m/s^2


def test_brakes_for_a_plan_that_stops_and_ends_there():
    car, tracker = Bicycle(speed=6.0), TrajectoryTracker()
    for step in range(60):  # 2.4 m/s^2 to rest at x = 7.5
        t = step * DT + 0.2 * np.arange(1, 16)
        x = np.where(t < 2.5, 6.0 * t - 1.2 * t**2, 7.5)
        car.step(tracker.command(plan(car.to_ego(np.stack([x, 0 * x], 1))), car.speed))
    assert car.speed == 0.0
    assert car.x == pytest.approx(7.5, abs=0.3)


def test_a_plan_in_one_place_means_hold():
    points = np.random.default_rng(0).normal(0, 0.05, (15, 2))
    command = TrajectoryTracker().command(plan(points), 0.0)
    assert (command.throttle, command.brake) == (0.0, METADRIVE.hold_brake)
    moving = points + np.outer(np.arange(1, 16) * 0.2, [1.5, 0.0])
    assert TrajectoryTracker().command(plan(moving), 0.0).throttle > 0.1


def test_age_looks_further_into_the_plan():
    t = 0.2 * np.arange(1, 16)
    speeding_up = plan(np.stack([0.5 * t**2, 0 * t], 1))
    first = TrajectoryTracker().command(speeding_up, 0.0)
    later = TrajectoryTracker().command(speeding_up, 1.0, age=1.0)
    assert later.throttle == pytest.approx(first.throttle, abs=0.02)
    assert TrajectoryTracker().command(speeding_up, 1.0).throttle < first.throttle - 0.2


def test_pose_from_odometry_replaces_the_guess():
    straight = plan(np.stack([1.0 + np.arange(15), np.zeros(15)], 1))
    centred = TrajectoryTracker().command(straight, 5.0, pose=(0.0, 0.0, 0.0))
    left_of_it = TrajectoryTracker().command(straight, 5.0, pose=(0.0, 0.8, 0.0))
    assert centred.steer == pytest.approx(0.0, abs=1e-6)
    assert left_of_it.steer < -0.02


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad):
    tracker, good = TrajectoryTracker(), plan(np.ones((15, 2)))
    with pytest.raises(ValueError, match='not finite'):
        tracker.command(plan(np.full((15, 2), bad)), 1.0)
    with pytest.raises(ValueError, match='not finite'):
        tracker.command(good, bad)
    with pytest.raises(ValueError, match='finite'):
        tracker.stop(bad, 3.0)
    with pytest.raises(ValueError, match='ended'):
        tracker.command(good, 1.0, age=3.5)


def test_stop_brings_to_rest_and_holds():
    car, tracker = Bicycle(speed=8.0), TrajectoryTracker()
    for _ in range(40):
        command = tracker.stop(car.speed, 4.0)
        car.step(command)
    assert car.speed == 0.0
    assert 7.0 < car.x < 9.0  # 8 m/s with 4 m/s^2: 8 m
    assert command.brake == METADRIVE.hold_brake


# ---- braking along the way ----


def brake_on(world_of, speed, deceleration, planned_speed=None, blind=False):
    """Brake on a way that was planned at the start; return how far the car came and how far beside the way it was."""
    planned_speed = speed if planned_speed is None else planned_speed
    way = plan([world_of(planned_speed * 0.2 * k) for k in range(1, 16)])
    car, tracker, pose, off = Bicycle(speed=speed), TrajectoryTracker(), (0.0, 0.0, 0.0), 0.0
    line = np.array([world_of(s) for s in np.arange(0, 60, 0.1)])
    driven = 0.0
    for _ in range(120):
        where = pose if blind else (car.x, car.y, car.yaw)
        car.step(tracker.brake(way, car.speed, deceleration, where))
        driven += car.speed * DT
        pose = tracker.roll(pose, car.speed * DT)
        off = max(off, float(np.hypot(*(line - (car.x, car.y)).T).min()))
    assert car.speed == 0.0
    return driven, off


def circle(s):
    return 20 * np.sin(s / 20), 20 - 20 * np.cos(s / 20)


@pytest.mark.parametrize('speed', [3.0, 8.0, 12.0])
@pytest.mark.parametrize('deceleration', [2.5, 8.0])
def test_braking_keeps_to_the_way_and_needs_little_more_than_physics(speed, deceleration):
    driven, off = brake_on(circle, speed, deceleration)
    least = speed**2 / (2 * deceleration)
    assert least - speed * DT <= driven <= least + speed * DT
    assert off < 0.6


def test_braking_without_odometry_keeps_to_the_way_as_well():
    _, off = brake_on(circle, 8.0, 2.5, blind=True)
    assert off < 1.0
    straight_on = brake_on(lambda s: (s, 0.0), 8.0, 2.5, blind=True)[1]
    assert straight_on < 0.05


def test_a_plan_that_was_about_to_stop_is_not_overrun():
    """The last plan braked within 8 m, and comfort would need 12.8 m: somebody may stand there."""
    driven, _ = brake_on(lambda s: (min(s, 8.0), 0.0), 8.0, 2.5)
    assert driven <= 8.0 + 0.3
    assert brake_on(lambda s: (s, 0.0), 8.0, 2.5)[0] > 12.0


def test_braking_refuses_what_is_not_finite():
    for bad in ((np.nan, 2.5, (0.0, 0.0, 0.0)), (8.0, 2.5, (np.inf, 0.0, 0.0))):
        with pytest.raises(ValueError, match='not finite'):
            TrajectoryTracker().brake(plan(np.ones((15, 2))), *bad)


@pytest.mark.filterwarnings('error')
def test_a_plan_of_few_and_far_points_is_followed_without_a_mean_of_nothing():
    far = plan(np.array([[3.5, 0.0], [7.0, 0.0]]), dt=0.7)
    near = plan(np.array([[3.5, 0.0], [3.6, 0.0]]), dt=0.7)
    commands = [TrajectoryTracker(METADRIVE).command(one, 5.0) for one in (far, near)]
    assert commands[0].brake < 0.05 < commands[1].brake

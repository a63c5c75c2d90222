"""The last plan that was believed and where the car is on it: by odometry, or, when that fails, by what was commanded.

Two clocks: stamps, by which plans and odometry are set against each other, and `now`, the steady clock by which both age after
they came. A clock that is set therefore moves nothing. Knows no message; faults are ValueErrors.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from mose_ros.core.navigation import EgoHistory, coast, to_ego
from mose_ros.core.safety import OdometryCheck, TrajectoryLimits, check_trajectory
from mose_ros.core.types import EgoState, Trajectory

Pose = tuple[float, float, float]  # x, y, yaw in the frame of the plan
Roll = Callable[[Pose, float], Pose]  # where so many metres of the last steering lead


class Pursuit:
    """Tells how old the plan is, where on it the car is, and how fast."""

    def __init__(self, *, max_jump_m: float):
        self._check = OdometryCheck(max_jump_m=max_jump_m)
        self.clear(0.0)

    def clear(self, now: float) -> None:
        """Forget everything."""
        self._check.clear()
        self._history = EgoHistory()
        self.trajectory: Trajectory | None = None  # the last that was believed
        self.serves = False  # it may be followed; else one may only brake along it
        self.pose: Pose | None = None
        self.speed = 0.0
        self.is_blind = True
        self._origin: EgoState | None = None  # where the car was at the plan's time
        self._plan_came = self._odometry_came = self._moved = now
        self._plan_age = self._odometry_age = 0.0
        self._is_broken = False

    def hear_odometry(self, stamp: float, ego: EgoState, age: float, now: float) -> float:
        """Take an odometry that was `age` seconds old when it came; return by how much its time went back.

        Raises ValueError as `OdometryCheck` does; from then on, until a good one comes, the car moves blind.
        """
        newest = self._history.newest
        back = max(0.0, newest[0] - stamp) if newest else 0.0
        if back:
            self.serves = False  # its time is another one
        was_broken, self._is_broken = self._is_broken, True
        self._check.check(stamp, ego)
        self._is_broken = False
        if was_broken:  # it may have begun anew elsewhere: go on from where we are
            self._history.clear()
            if self.pose is not None:
                self._origin = _origin_of(ego, self.pose)
        self._history.add(stamp, ego)
        self.speed = ego.speed
        self._odometry_came, self._odometry_age = now, max(0.0, age)
        return back

    def lose_odometry(self) -> None:
        """Take note of an odometry that could not even be read."""
        self._is_broken = True

    def hear_plan(
        self,
        trajectory: Trajectory,
        age: float,
        now: float,
        limits: TrajectoryLimits,
        tolerance_s: float,
    ) -> None:
        """Take a plan that was `age` seconds old when it came; ValueError for one that is not believed.

        `tolerance_s`: the odometry of its moment may be so far away.
        """
        if self.serves and trajectory.time <= self.trajectory.time:
            raise ValueError(f'the plan is not newer than the last ({trajectory.time:.3f} s)')
        origin = self._history.estimate(trajectory.time, tolerance_s)
        if origin is None:
            raise ValueError('there is no odometry of the moment of the plan')
        check_trajectory(trajectory, origin.speed, limits)
        if self.pose is not None:  # blind, nobody else brings it into the frame of this plan
            self.pose = _pose_in(origin, _place(self._origin, self.pose))
        self.trajectory, self.serves, self._origin = trajectory, True, origin
        self._plan_age, self._plan_came = age, now

    def silence(self, now: float) -> float:
        """Return for how long no odometry has come."""
        return now - self._odometry_came

    def plan_age(self, now: float) -> float:
        """Return the time from the pictures of the plan to now."""
        return self._plan_age + max(0.0, now - self._plan_came)

    def go_back(self, now: float) -> None:
        """Count from here what came later than now; simulated time goes back."""
        self._odometry_came = min(self._odometry_came, now)
        self._plan_came = min(self._plan_came, now)
        self._moved = min(self._moved, now)

    def move_on(self, now: float, timeout_s: float, deceleration: float, roll: Roll) -> None:
        """Bring pose and speed up to now; blind, trusting in the last command, after `timeout_s` without odometry."""
        since, self._moved = max(self._moved, self._odometry_came), now
        newest = self._history.newest
        self.is_blind = self._is_broken or newest is None or self.silence(now) > timeout_s
        if not self.is_blind:
            lag = min(self._odometry_age + max(0.0, self.silence(now)), timeout_s)
            self.pose = _pose_in(self._origin, coast(newest[1], lag)) if self._origin else None
            return
        passed, before = max(0.0, now - since), abs(self.speed)
        self.speed = max(0.0, before - passed * deceleration)
        if self.pose is not None:
            self.pose = roll(self.pose, 0.5 * (before + self.speed) * passed)


def _pose_in(origin: EgoState, ego: EgoState) -> Pose:
    """Return the pose of a car at `ego` on a plan that began at `origin`."""
    x, y = to_ego((ego.x, ego.y), origin.x, origin.y, origin.yaw)
    return float(x), float(y), math.remainder(ego.yaw - origin.yaw, 2 * math.pi)


def _place(origin: EgoState, pose: Pose) -> EgoState:
    """Return where a car is that has this pose on a plan that began at `origin`."""
    x, y, turned = pose
    cos, sin = math.cos(origin.yaw), math.sin(origin.yaw)
    return replace(
        origin,
        x=origin.x + cos * x - sin * y,
        y=origin.y + sin * x + cos * y,
        yaw=origin.yaw + turned,
    )


def _origin_of(ego: EgoState, pose: Pose) -> EgoState:
    """Return where a plan began on which a car that is now at `ego` has that pose."""
    x, y, turned = pose
    yaw = ego.yaw - turned
    cos, sin = math.cos(yaw), math.sin(yaw)
    return replace(ego, x=ego.x - cos * x + sin * y, y=ego.y - sin * x - cos * y, yaw=yaw)

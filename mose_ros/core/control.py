"""From trajectory to vehicle command: the one place that does it, for the lock-step loop and for the controller node.

It knows how one vehicle answers its actuators (VehicleModel) and no scene, no clock and no ROS. Trajectories come from a
network: about 15 points over 3 s with some centimetres of noise, so nothing here looks at a single point; it fits.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mose_ros.core.types import Trajectory, VehicleCommand

STANDSTILL = 0.3  # m: a trajectory that stays this near means stop and hold
STANDING = 0.15  # m/s: slower is standing
LOST = 3.0  # m beside a way: it is no longer worth steering for
_STRIDE = 0.3  # m: points of a way that are nearer to each other say nothing about its direction
_ARC_SIGMA, _CURVATURE_SIGMA = 0.1, 0.05  # m of noise of a point, 1/m that the curvature may jump


@dataclass(frozen=True, kw_only=True)
class VehicleModel:
    """How a vehicle answers its actuators: a kinematic bicycle, linear throttle and brake."""

    wheelbase: float  # m
    rear_axle: float  # m from the rear axle forward to the centre of the body
    max_steer: float  # rad of the front wheels at steer = 1
    steer_rate: float  # of the command, 1/s
    throttle_gain: float  # m/s^2 at throttle = 1
    brake_gain: float  # m/s^2 at brake = 1, as far as the tyres hold
    max_deceleration: float  # m/s^2 that the tyres hold
    hold_brake: float  # brake that keeps the vehicle at rest


# Measured on MetaDrive 0.4.3's default vehicle: steady turns at 3 to 12 m/s give wheelbase 2.5 to 2.56; yaw follows the
# wheel within one step of 0.1 s; sim.physics gives the actuators' gains. Brakes above 0.2 jitter at rest.
METADRIVE = VehicleModel(
    wheelbase=2.53,
    rear_axle=1.4,
    max_steer=float(np.radians(40.0)),
    steer_rate=4.0,
    throttle_gain=2.8,
    brake_gain=18.07,
    max_deceleration=8.5,
    hold_brake=0.1,
)


class TrajectoryTracker:
    """Follow trajectories with one vehicle, smoothly though their points are noisy."""

    def __init__(self, model: VehicleModel = METADRIVE, dt: float = 0.1):
        self._model = model
        self._dt = dt
        self.reset()

    def reset(self) -> None:
        """Forget the previous command."""
        self._curvature = 0.0
        self._steer = 0.0
        self._acceleration = np.nan  # none yet

    def command(
        self,
        trajectory: Trajectory,
        speed: float,
        age: float = 0.0,
        pose: tuple[float, float, float] | None = None,
    ) -> VehicleCommand:
        """Answer one control step.

        `age` is the time since the trajectory's own `time`; `pose` (x, y, yaw) is where the vehicle is now in the
        trajectory's frame, from odometry. Without `pose` the vehicle is taken to be where the trajectory wanted it.
        ValueError when a number is not finite or the trajectory has run out.
        """
        times, points = self._ahead(trajectory, speed, age, pose)
        if speed < 0.5 and np.hypot(*points[-3:].mean(axis=0)) < STANDSTILL:
            return self._hold()
        curvature = self._fit_curvature(points, speed)
        wanted = _fit_acceleration(times, points, speed, curvature)
        if abs(wanted - self._acceleration) < 1.2:  # that much is noise; a danger is not smoothed
            wanted = 0.5 * (wanted + self._acceleration)
        self._acceleration = acceleration = wanted
        if speed < STANDING and acceleration < 0.05:
            return self._hold()
        steer = np.arctan(curvature * self._model.wheelbase) / self._model.max_steer
        return self._apply(steer, acceleration)

    def brake(
        self,
        trajectory: Trajectory,
        speed: float,
        deceleration: float,
        pose: tuple[float, float, float],
    ) -> VehicleCommand:
        """Come to rest on the way of a trajectory, whatever its times say; beyond its end straight on.

        At least `deceleration`, and as much more as it takes to rest before the way ends: nobody has looked further.
        `pose` as in `command`. ValueError when a number is not finite or the way is further away than LOST.
        """
        values = [speed, deceleration, *pose]
        if not (np.all(np.isfinite(values)) and np.all(np.isfinite(trajectory.xy))):
            raise ValueError(f'speed, deceleration, pose {values} or trajectory is not finite')
        points, remaining = _way_ahead(trajectory, pose)
        curvature = self._fit_curvature(points, speed)
        steer = np.arctan(curvature * self._model.wheelbase) / self._model.max_steer
        if abs(speed) < STANDING:
            return self._apply(steer, -self._model.hold_brake * self._model.brake_gain)
        needed = speed**2 / (2.0 * max(remaining, STANDSTILL))
        return self._apply(steer, -max(deceleration, needed))

    def roll(self, pose: tuple[float, float, float], metres: float) -> tuple[float, float, float]:
        """Return where the last steering takes the vehicle from `pose`; for when nobody measures it."""
        x, y, yaw = pose
        turned = self._curvature * metres
        middle = yaw + 0.5 * turned
        return x + metres * float(np.cos(middle)), y + metres * float(np.sin(middle)), yaw + turned

    def stop(self, speed: float, deceleration: float) -> VehicleCommand:
        """Brake in a straight line and hold; for when there is no valid trajectory."""
        if not (np.isfinite(speed) and np.isfinite(deceleration) and deceleration > 0):
            raise ValueError(
                f'stop needs a finite speed and a deceleration > 0, not {speed}, {deceleration}'
            )
        self._curvature = 0.0
        if abs(speed) < STANDING:
            return self._apply(0.0, -self._model.hold_brake * self._model.brake_gain)
        return self._apply(0.0, -deceleration)

    def _ahead(self, trajectory, speed, age, pose):
        """Return times from now and points in the frame of the vehicle now, those that lie ahead in time."""
        values = [speed, age, *(pose or ())]
        if not (np.all(np.isfinite(values)) and np.all(np.isfinite(trajectory.xy))):
            raise ValueError(
                f'speed {speed}, age {age}, pose {pose} or trajectory is not finite; brake with stop()'
            )
        times = trajectory.times() - age
        if times[-1] <= 0:
            raise ValueError(f'the trajectory ended {-times[-1]:.2f} s ago; brake with stop()')
        x, y, yaw = pose if pose is not None else self._planned_pose(trajectory, age)
        ahead = times > 0.02
        offset = trajectory.xy[ahead] - (x, y)
        cos, sin = np.cos(yaw), np.sin(yaw)
        return times[ahead], offset @ np.array([[cos, -sin], [sin, cos]])

    def _planned_pose(self, trajectory: Trajectory, age: float) -> tuple[float, float, float]:
        if age <= 0:
            return 0.0, 0.0, 0.0
        times = np.concatenate([[0.0], trajectory.times()])
        x = np.interp(age, times, np.concatenate([[0.0], trajectory.xy[:, 0]]))
        y = np.interp(age, times, np.concatenate([[0.0], trajectory.xy[:, 1]]))
        return float(x), float(y), self._curvature * float(np.hypot(x, y))

    def _fit_curvature(self, points: Float[np.ndarray, 'T 2'], speed: float) -> float:
        """Fit the turn of the rear axle that brings the centre through the points around the look-ahead distance.

        Pure pursuit (Coulter 1992), but exact for a target of the body's centre, and least squares over a window with the
        last curvature as prior: that is what stands in for a filter when the points are near and say little.
        """
        distance = np.hypot(*points.T)
        look_ahead = np.clip(0.9 * speed, 2.2, 12.0)
        # a plan that ends sooner is followed to its end
        centre = min(look_ahead, max(float(distance.max()), 0.5))
        weight = np.exp(-0.5 * ((distance - centre) / (0.35 * centre)) ** 2)
        lever = 0.5 * (distance**2 + 2.0 * self._model.rear_axle * points[:, 0])
        trust = (_ARC_SIGMA / _CURVATURE_SIGMA) ** 2
        fit = weight @ (points[:, 1] * lever) + trust * self._curvature
        limit = np.tan(self._model.max_steer) / self._model.wheelbase
        self._curvature = float(np.clip(fit / (weight @ lever**2 + trust), -limit, limit))
        return self._curvature

    def _apply(self, steer: float, acceleration: float) -> VehicleCommand:
        """Limit the rate of the wheel and split acceleration into throttle and brake."""
        step = self._model.steer_rate * self._dt
        self._steer = float(np.clip(np.clip(steer, self._steer - step, self._steer + step), -1, 1))
        acceleration = max(acceleration, -self._model.max_deceleration)
        return VehicleCommand(
            steer=self._steer,
            throttle=float(np.clip(acceleration / self._model.throttle_gain, 0.0, 1.0)),
            brake=float(np.clip(-acceleration / self._model.brake_gain, 0.0, 1.0)),
        )

    def _hold(self) -> VehicleCommand:
        return VehicleCommand(steer=self._steer, throttle=0.0, brake=self._model.hold_brake)


def _way_ahead(trajectory, pose) -> tuple[Float[np.ndarray, 'N 2'], float]:
    """Return the way before the vehicle, in its frame and straight beyond the end, and how many metres of it were planned."""
    kept = [np.zeros(2)]
    for point in trajectory.xy:
        if np.hypot(*(point - kept[-1])) >= _STRIDE:
            kept.append(point)
    planned = len(kept) > 1
    way = np.array(kept if planned else [[0.0, 0.0], [_STRIDE, 0.0]])
    steps = np.diff(way, axis=0)
    lengths = np.hypot(*steps.T)
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    x, y, yaw = pose
    share = np.clip((((x, y) - way[:-1]) * steps).sum(1) / lengths**2, 0.0, 1.0)
    feet = way[:-1] + share[:, None] * steps
    nearest = int(np.argmin(np.hypot(*(feet - (x, y)).T)))
    here = along[nearest] + share[nearest] * lengths[nearest]
    end, heading = along[-1] if planned else 0.0, steps[-1] / lengths[-1]
    beyond = float((np.array([x, y]) - way[-1]) @ heading) if nearest == len(feet) - 1 else 0.0
    here += max(beyond, 0.0)
    off = float(np.hypot(*(feet[nearest] + max(beyond, 0.0) * heading - (x, y))))
    if off > LOST:
        raise ValueError(f'the way is {off:.1f} m away')
    wanted = here + np.arange(0.5, 25.0, 0.5)
    points = np.stack([np.interp(wanted, along, way[:, axis]) for axis in (0, 1)], axis=1)
    points += np.maximum(wanted - along[-1], 0.0)[:, None] * heading
    cos, sin = np.cos(yaw), np.sin(yaw)
    return (points - (x, y)) @ np.array([[cos, -sin], [sin, cos]]), float(max(end - here, 0.0))


def _fit_acceleration(times, points, speed, curvature) -> float:
    """Return the constant acceleration that meets the next 1.2 s of the plan best in least squares."""
    chord = np.hypot(*points.T) * np.where(points[:, 0] < -0.3, -1.0, 1.0)
    # chord to arc, second order: noise doesn't add up as it would over the segments' lengths
    travelled = chord * (1.0 + (curvature * chord) ** 2 / 24.0)
    near = times <= max(1.2, times[min(2, len(times) - 1)])
    basis = 0.5 * times[near] ** 2
    fit = float(basis @ (travelled - speed * times)[near] / (basis @ basis))
    first, last = np.array_split(travelled[times > 1.0], 2) if times[-1] > 1.3 else ([], [])
    if len(last) and abs(np.mean(last) - np.mean(first)) < 0.12:
        # the plan is at rest within the window: a constant acceleration must end there, not run on into reverse
        remaining = max(float(np.mean(travelled[times > 1.0])), 0.05)
        fit = min(fit, -(speed**2) / (2.0 * remaining))
    return fit

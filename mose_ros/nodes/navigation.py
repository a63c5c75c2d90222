"""What a node remembers of odometry and route: the ego state at a moment, and where the route goes from there.

Plain numbers from `conversions`; knows no message and no node. The rules for acceleration and for the distance since the
last standstill are those of the simulator (sim/world.py), on which the networks learned them.
"""

from collections import deque
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from mose_ros.core.types import FAR_M, NEAR_M, Command, EgoState, Guidance

STILL_MPS = 0.1  # slower counts as standing
STILL_S = 0.25  # for so long makes a standstill
SMOOTHING_S = 0.1  # in which the acceleration takes half of a change
UNKNOWN_M = 100.0  # since the last standstill, when the first odometry finds the vehicle driving


class EgoHistory:
    """The last second of ego states, newest last. Feed it every odometry; ask it for the state of an image's moment."""

    def __init__(self, keep_s: float = 1.0):
        self._keep_s = keep_s
        self.clear()

    def clear(self) -> None:
        """Forget everything; for when time goes backwards."""
        self._states: deque[tuple[float, EgoState]] = deque()
        self._still_s = 0.0

    @property
    def newest(self) -> tuple[float, EgoState] | None:
        """Return stamp and state of the newest odometry, or None."""
        return self._states[-1] if self._states else None

    def add(self, time: float, measured: EgoState) -> EgoState:
        """Complete a measured state with acceleration and memory, and keep it; an older stamp clears the rest."""
        if self._states and time < self._states[-1][0]:
            self.clear()
        if not self._states:
            state = replace(
                measured, since_stop=0.0 if abs(measured.speed) < STILL_MPS else UNKNOWN_M
            )
        elif time == self._states[-1][0]:
            return self._states[-1][1]
        else:
            state = self._follow(time, measured)
        self._states.append((time, state))
        while self._states[0][0] < time - self._keep_s:
            self._states.popleft()
        return state

    def at(self, time: float, tolerance: float) -> EgoState | None:
        """Return the state whose stamp is nearest to `time`, None when it is further away than `tolerance`."""
        if not self._states:
            return None
        stamp, state = min(list(self._states), key=lambda entry: abs(entry[0] - time))
        return state if abs(stamp - time) <= tolerance else None

    def _follow(self, time: float, measured: EgoState) -> EgoState:
        before, last = self._states[-1]
        dt = time - before
        share = 1.0 - 0.5 ** (dt / SMOOTHING_S)
        slope = (measured.speed - last.speed) / dt
        self._still_s = self._still_s + dt if abs(measured.speed) < STILL_MPS else 0.0
        driven = last.since_stop + abs(measured.speed) * dt
        return replace(
            measured,
            acceleration=last.acceleration + share * (slope - last.acceleration),
            since_stop=0.0 if self._still_s > STILL_S else driven,
        )


class RouteFollower:
    """A route as a polyline in the odometry's frame, and how far along it the vehicle is."""

    def __init__(self, points: Float[np.ndarray, 'N 2'], window: float = 25.0):
        if points.ndim != 2 or points.shape[1] != 2 or len(points) < 2:
            raise ValueError(f'a route needs at least two points (N, 2), not {points.shape}')
        if not np.isfinite(points).all():
            raise ValueError('the route has points that are not finite')
        lengths = np.hypot(*np.diff(points, axis=0).T)
        keep = np.concatenate([[True], lengths > 1e-6])
        if keep.sum() < 2:
            raise ValueError('all points of the route are the same')
        self.points = points[keep]
        self._steps = np.diff(self.points, axis=0)
        self._lengths = np.hypot(*self._steps.T)
        self._along = np.concatenate([[0.0], np.cumsum(self._lengths)])
        self._window = window
        self.progress: float | None = None  # m; None until the first projection

    def project(self, x: float, y: float) -> float:
        """Return how far along the route its nearest point is; near the last one, so that crossing ways keep apart."""
        share = ((np.array([x, y]) - self.points[:-1]) * self._steps).sum(1) / self._lengths**2
        share = np.clip(share, 0.0, 1.0)
        foot = self.points[:-1] + share[:, None] * self._steps
        distance = np.hypot(*(foot - (x, y)).T)
        station = self._along[:-1] + share * self._lengths
        if self.progress is not None:
            near = np.abs(station - self.progress) <= self._window
            if near.any() and distance[near].min() < self._window:
                distance = np.where(near, distance, np.inf)
        self.progress = float(station[int(np.argmin(distance))])
        return self.progress

    def point(self, station: float) -> Float[np.ndarray, '2']:
        """Return the point at a distance along the route; beyond the end it goes straight on."""
        index = int(np.searchsorted(self._along, station, side='right')) - 1
        index = min(max(index, 0), len(self._steps) - 1)
        share = (station - self._along[index]) / self._lengths[index]
        return self.points[index] + max(share, 0.0) * self._steps[index]

    def guidance(self, ego: EgoState, command: Command) -> Guidance:
        """Return what the navigation says from where the ego is."""
        progress = self.project(ego.x, ego.y)
        near, far = (
            to_ego(self.point(progress + distance), ego.x, ego.y, ego.yaw)
            for distance in (NEAR_M, FAR_M)
        )
        return Guidance(near=near, far=far, command=command)


def to_ego(
    points: Float[np.ndarray, '*N 2'], x: float, y: float, yaw: float
) -> Float[np.ndarray, '*N 2']:
    """Return points of the world frame in the frame of a vehicle there."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return (np.asarray(points, float) - (x, y)) @ np.array([[cos, -sin], [sin, cos]])

"""What a driver remembers of odometry and route: the ego state at a moment, and where the route goes from there.

The rules for acceleration, for the distance since the last standstill and for commands are those of the simulator (sim/world.py,
sim/town.py), on which the networks learned them.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from mose_ros.core.types import FAR_M, NEAR_M, Command, EgoState, Guidance

STILL_MPS = 0.1  # slower counts as standing
STILL_S = 0.25  # for so long makes a standstill
SMOOTHING_S = 0.1  # in which the acceleration takes half of a change
UNKNOWN_M = 100.0  # since the last standstill, when the first odometry finds the vehicle driving
COMMAND_AHEAD_M = 30.0  # before a junction its command is given
MAX_ROUTE_M = 1e6  # its curve takes a point a metre
SAME_PLACE_M = 1.0  # places of a route that differ less in distance are as near
OFF_ROUTE_M, BACKWARDS = 50.0, 2.4  # m; rad from straight ahead of both points of the guidance
TURN, TURN_M = 0.5, 20.0  # rad that a route turns within so many metres where it turns off


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

    def estimate(self, time: float, tolerance: float) -> EgoState | None:
        """Return the state at `time`, moved there from the nearest one; None when that is further away than `tolerance`."""
        if not self._states:
            return None
        stamp, state = min(list(self._states), key=lambda entry: abs(entry[0] - time))
        return coast(state, time - stamp) if abs(stamp - time) <= tolerance else None

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


def coast(ego: EgoState, seconds: float) -> EgoState:
    """Return where a vehicle is a moment later, at the same speed and yaw rate."""
    turned = ego.yaw_rate * seconds
    middle, way = ego.yaw + 0.5 * turned, ego.speed * seconds
    x, y = ego.x + way * float(np.cos(middle)), ego.y + way * float(np.sin(middle))
    return replace(ego, x=x, y=y, yaw=ego.yaw + turned)


class RouteFollower:
    """A route as a polyline in the odometry's frame, and how far along it the vehicle is.

    `commands`, where the route's maker knows them, say what is asked for from each point to the next.
    """

    def __init__(
        self,
        points: Float[np.ndarray, '...'],
        window: float = 25.0,
        commands: Sequence[Command] | None = None,
    ):
        if points.ndim != 2 or points.shape[1] != 2 or len(points) < 2:
            raise ValueError(f'a route needs at least two points (N, 2), not {points.shape}')
        if not np.isfinite(points).all():
            raise ValueError('the route has points that are not finite')
        lengths = np.hypot(*np.diff(points, axis=0).T)
        keep = np.concatenate([[True], lengths > 1e-6])
        if keep.sum() < 2:
            raise ValueError('all points of the route are the same')
        if commands is not None and len(commands) != len(points):
            raise ValueError(f'{len(commands)} commands for {len(points)} points of the route')
        self.points = points[keep]
        self._commands = None
        if commands is not None:  # of points that coincide the last one's holds
            last = np.append(np.flatnonzero(keep)[1:], len(points)) - 1
            self._commands = [commands[index] for index in last]
        self._steps = np.diff(self.points, axis=0)
        self._lengths = np.hypot(*self._steps.T)
        self._along = np.concatenate([[0.0], np.cumsum(self._lengths)])
        self._window = window
        self.progress: float | None = None  # m; None until the first projection
        self.distance = 0.0  # m from the route to the last projected place

    def project(self, x: float, y: float) -> float:
        """Return how far along the route its nearest point is.

        Near the last one, so that crossing ways keep apart; where there is none, of places that are as near the first, so that
        who begins on a round does not take its end for the beginning.
        """
        share = ((np.array([x, y]) - self.points[:-1]) * self._steps).sum(1) / self._lengths**2
        share = np.clip(share, 0.0, 1.0)
        foot = self.points[:-1] + share[:, None] * self._steps
        distance = np.hypot(*(foot - (x, y)).T)
        station = self._along[:-1] + share * self._lengths
        nearest = None
        if self.progress is not None:
            near = np.abs(station - self.progress) <= self._window
            if near.any() and distance[near].min() < self._window:
                nearest = int(np.argmin(np.where(near, distance, np.inf)))
        if nearest is None:
            nearest = _first_nearest(distance)
        self.progress, self.distance = float(station[nearest]), float(distance[nearest])
        return self.progress

    def point(self, station: float) -> Float[np.ndarray, '2']:
        """Return the point at a distance along the route; beyond the end it goes straight on."""
        index = int(np.searchsorted(self._along, station, side='right')) - 1
        index = min(max(index, 0), len(self._steps) - 1)
        share = (station - self._along[index]) / self._lengths[index]
        return self.points[index] + max(share, 0.0) * self._steps[index]

    def command(self) -> Command:
        """Return what is asked for from the last projection on: given, or else read off the route's turns.

        A line shows neither junctions that are crossed straight on nor lane changes, and a bend as tight as a turn is one.
        """
        start = self.progress or 0.0
        if self._commands is None:
            return self._turn(start)
        ends = self._along[1:]
        ahead = (ends > start) & (self._along[:-1] <= start + COMMAND_AHEAD_M)
        asked = (self._commands[index] for index in np.flatnonzero(ahead))
        return next((one for one in asked if one is not Command.FOLLOW), Command.FOLLOW)

    def _turn(self, start: float) -> Command:
        stations = np.arange(start - TURN_M, start + COMMAND_AHEAD_M + TURN_M + 1.0, 2.0)
        points = np.array([self.point(max(station, 0.0)) for station in stations])
        steps = np.diff(points, axis=0)
        moving = np.hypot(*steps.T) > 1e-6
        yaw = np.unwrap(np.arctan2(steps[moving, 1], steps[moving, 0]))
        span = int(TURN_M / 2.0)
        turned = yaw[span:] - yaw[:-span]
        sharp = turned[np.abs(turned) > TURN]
        if not len(sharp):
            return Command.FOLLOW
        return Command.LEFT if sharp[0] > 0 else Command.RIGHT

    def guidance(self, ego: EgoState, command: Command | None = None) -> Guidance:
        """Return what the navigation says from where the ego is; without a command the route's own."""
        progress = self.project(ego.x, ego.y)
        command = self.command() if command is None else command
        near, far = (
            to_ego(self.point(progress + distance), ego.x, ego.y, ego.yaw)
            for distance in (NEAR_M, FAR_M)
        )
        return Guidance(near=near, far=far, command=command)


def _first_nearest(distance: Float[np.ndarray, 'N']) -> int:
    """Return the nearest place of the first pass that is as near as any."""
    is_near = distance <= distance.min() + SAME_PLACE_M
    first = int(np.argmax(is_near))
    others = np.flatnonzero(~is_near[first:])
    last = first + int(others[0]) if len(others) else len(distance)
    return first + int(np.argmin(distance[first:last]))


def check_guidance(guidance: Guidance, distance: float) -> None:
    """Raise ValueError for a route that can't be meant: `distance` m away from the car, or leading back where it came from."""
    if distance > OFF_ROUTE_M:
        raise ValueError(f'the route is {distance:.0f} m away from the car')
    near, far = (abs(np.arctan2(point[1], point[0])) for point in (guidance.near, guidance.far))
    if min(near, far) > BACKWARDS:
        raise ValueError('the route leads back where the car comes from')


def smooth(
    points: Float[np.ndarray, 'N 2'], yaws: Float[np.ndarray, 'N'], step: float = 1.0
) -> tuple[Float[np.ndarray, 'M 2'], Int[np.ndarray, 'M']]:
    """Return a sparse route as a curve through its points along their headings, and of each new point the old one before it.

    Cubic Hermite pieces with tangents as long as the chord. A heading that points against its chord is not
    believed. ValueError for a route longer than MAX_ROUTE_M.
    """
    length = float(np.hypot(*np.diff(points, axis=0).T).sum())
    if not length <= MAX_ROUTE_M:
        raise ValueError(f'a route of {length:.3g} m; {MAX_ROUTE_M:.0f} m are enough for any')
    pieces, owners = [points[:1]], [np.zeros(1, int)]
    for index, (start, end) in enumerate(zip(points[:-1], points[1:], strict=True)):
        chord = end - start
        length = float(np.hypot(*chord))
        if length < 1e-6:
            continue
        first, last = (np.array([np.cos(yaw), np.sin(yaw)]) for yaw in yaws[index : index + 2])
        first, last = (one * length if one @ chord > 0 else chord for one in (first, last))
        t = np.linspace(0.0, 1.0, max(1, round(length / step)) + 1)[1:, None]
        basis = (2 * t**3 - 3 * t**2 + 1, t**3 - 2 * t**2 + t, 3 * t**2 - 2 * t**3, t**3 - t**2)
        pieces.append(basis[0] * start + basis[1] * first + basis[2] * end + basis[3] * last)
        owners.append(np.full(len(t), index))
        owners[-1][-1] = index + 1
    return np.concatenate(pieces), np.concatenate(owners)


def to_ego(
    points: Float[np.ndarray, '*N 2'] | Sequence, x: float, y: float, yaw: float
) -> Float[np.ndarray, '*N 2']:
    """Return points of the world frame in the frame of a vehicle there."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return (np.asarray(points, float) - (x, y)) @ np.array([[cos, -sin], [sin, cos]])

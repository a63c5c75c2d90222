"""The road as a coordinate system: distance along the route's centre line and offset from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mose_ros.core.types import Command, Corridor

_EXTRA_M = (
    90.0  # the line goes on straight behind its end, so that a plan may look beyond the goal
)


class Frenet:
    """A corridor with the tools to go between world (x, y) and (s, d): metres along from its start, metres to the left."""

    def __init__(self, corridor: Corridor):
        xy = np.asarray(corridor.xy, float)
        if len(xy) < 2:
            raise ValueError(f'a corridor needs two points or more, not {len(xy)}')
        steps = np.diff(xy, axis=0)
        length = np.hypot(*steps.T)
        fresh = np.concatenate([[True], length > 1e-3])  # doubled points have no direction
        xy, index = xy[fresh], np.flatnonzero(fresh)
        self.length = float(length.sum())
        extra = np.array([_EXTRA_M / 2, _EXTRA_M])
        before = xy[0] - np.outer(extra[::-1], _unit(xy[1] - xy[0]))
        self.xy = np.vstack([before, xy, xy[-1] + np.outer(extra, _unit(xy[-1] - xy[-2]))])
        index = np.pad(index, 2, 'edge')
        steps = np.diff(self.xy, axis=0)
        self._length = np.hypot(*steps.T)
        self._direction = steps / self._length[:, None]
        self.s = np.concatenate([[0.0], np.cumsum(self._length)]) - _EXTRA_M
        turn = np.unwrap(np.arctan2(steps[:, 1], steps[:, 0]))
        # heading at the points: between the segments that meet there
        self.heading = np.concatenate([turn[:1], (turn[:-1] + turn[1:]) / 2, turn[-1:]])
        curvature = np.gradient(self.heading, self.s)
        self.curvature = np.convolve(np.pad(curvature, 2, 'edge'), np.ones(5) / 5, 'valid')
        self.curvature[:2] = self.curvature[-2:] = 0.0
        self.left = np.asarray(corridor.left, float)[index]
        self.right = np.asarray(corridor.right, float)[index]
        self.own_left = np.asarray(corridor.own_left, float)[index]
        self.lane_width = np.asarray(corridor.lane_width, float)[index]
        self.speed_limit = np.asarray(corridor.speed_limit, float)[index]
        self.junction = np.asarray(corridor.junction, bool)[index]
        self.commands: Sequence[Command] = [corridor.commands[i] for i in index]

    def at(self, s, values: Float[np.ndarray, 'N']):
        """Look up one of the arrays along the line."""
        return np.interp(s, self.s, values)

    def project(
        self, points: Float[np.ndarray, '... 2'], near: tuple[float, float] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return s and d of each point's nearest place on the line; `near` limits the search to a range of s."""
        first, last = 0, len(self._length)
        if near is not None:
            first = int(np.clip(np.searchsorted(self.s, near[0]) - 1, 0, last - 1))
            last = int(np.clip(np.searchsorted(self.s, near[1]), first + 1, last))
        flat = np.reshape(points, (-1, 1, 2)) - self.xy[first:last]
        direction, length = self._direction[first:last], self._length[first:last]
        along = np.clip(np.einsum('pnk,nk->pn', flat, direction), 0.0, length)
        offset = flat - along[..., None] * direction
        best = np.argmin(np.einsum('pnk,pnk->pn', offset, offset), axis=1)
        rows = np.arange(len(best))
        start, direction = flat[rows, best], direction[best]
        s = self.s[first + best] + along[rows, best]
        side = direction[:, 0] * start[:, 1] - direction[:, 1] * start[:, 0]
        d = np.copysign(np.hypot(*offset[rows, best].T), side)
        shape = np.shape(points)[:-1]
        return s.reshape(shape), d.reshape(shape)

    def world(self, s: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return x, y and the line's heading at (s, d)."""
        heading = np.interp(s, self.s, self.heading)
        x = np.interp(s, self.s, self.xy[:, 0]) - d * np.sin(heading)
        y = np.interp(s, self.s, self.xy[:, 1]) + d * np.cos(heading)
        return x, y, heading


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.hypot(*vector)), 1e-9)


def wrap(angle):
    """Bring an angle to -pi..pi."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


@dataclass(frozen=True, kw_only=True)
class Swing:
    """A way given point by point: s and d of the body's centre, and how far the body is turned against the road."""

    s: Float[np.ndarray, 'N']
    d: Float[np.ndarray, 'N']
    turn: Float[np.ndarray, 'N']


def swing_into_lane(
    start: tuple[float, float], turn: float, radius: float, rear_axle: float, offset: float = 0.0
) -> Swing | None:
    """Turn as tightly as `radius` (of the rear axle) out of a narrow place and straighten at `offset`; None if it can't be.

    Two arcs of a bicycle. The centre doesn't move where the body points, which matters between parked cars.
    """
    s0, d0 = start
    side = 1.0 if d0 < offset else -1.0
    begin = side * turn
    across = side * (offset - d0) + rear_axle * np.sin(begin)  # how far the rear axle has to go
    cosine = (1.0 + np.cos(begin) - across / radius) / 2.0
    if across < 0.2 or begin < -0.6 or not 0.3 < cosine < np.cos(begin):
        return None
    peak = float(np.arccos(cosine))
    length = radius * np.array([peak - begin, peak])
    arc = np.arange(0.0, length.sum(), 0.2)
    angle = np.where(arc < length[0], begin + arc / radius, peak - (arc - length[0]) / radius)
    angle = np.concatenate([angle, np.zeros(2)])
    ends = length.sum() - arc[-1]
    steps = np.concatenate([np.diff(arc), [ends, 2.0]])
    middle = (angle[:-1] + angle[1:]) / 2
    x = np.concatenate([[0.0], np.cumsum(steps * np.cos(middle))]) + rear_axle * np.cos(angle)
    y = np.concatenate([[0.0], np.cumsum(steps * np.sin(middle))]) + rear_axle * np.sin(angle)
    return Swing(s=s0 + x - x[0], d=d0 + side * (y - y[0]), turn=side * angle)


class PathTable:
    """Several ways to move across the road, as tables over one grid of arc length, ready for vectorised look-up.

    A way is a Swing, or a list of knots (s, d) that cubic pieces join, flat at every knot but the first, which has the
    vehicle's own direction. Replanning such a cubic at every moment is a damped spring towards the knot
    (d'' = 6 e / L^2 - 4 d' / L): it needs no memory and no measured curvature.
    """

    STEP = 0.5  # m

    def __init__(
        self,
        frenet: Frenet,
        start: tuple[float, float],
        slope: float,
        ways: Sequence[Sequence[tuple[float, float]] | Swing],
        reach: float,
    ):
        s0, d0 = start
        along = np.concatenate([np.arange(0.0, 12.0, 0.5), np.arange(12.0, reach + 20.0, 1.0)])
        self.grid = np.arange(0.0, reach, self.STEP)
        columns = []
        for way in ways:
            if isinstance(way, Swing):
                s = np.concatenate([way.s, way.s[-1] + along[1:]])
                d = np.concatenate([way.d, np.full(len(along) - 1, way.d[-1])])
            else:
                s = s0 + along
                d = _cubic(along, d0, slope, [(knot - s0, offset) for knot, offset in way])
            x, y, _ = frenet.world(s, d)
            arc = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))])
            columns.append([np.interp(self.grid, arc, part) for part in (x, y, d, s)])
        x, y, self.d, self.s = np.stack(columns, axis=1)
        course = np.unwrap(np.arctan2(np.gradient(y, axis=1), np.gradient(x, axis=1)), axis=1)
        curvature = np.gradient(course, self.STEP, axis=1)
        padded = np.pad(curvature, ((0, 0), (1, 1)), 'edge')
        self.curvature = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
        self.swings = np.array([isinstance(way, Swing) for way in ways])
        heading = course.copy()
        for row, way in enumerate(ways):
            if isinstance(way, Swing):
                turn = np.interp(self.s[row], way.s, way.turn)
                heading[row] = np.interp(self.s[row], frenet.s, frenet.heading) + turn
        self.table = np.stack([x, y, heading, self.d, self.s], axis=-1)  # (J, G, 5)

    def look_up(self, way: np.ndarray, arc: np.ndarray) -> np.ndarray:
        """Return x, y, heading, d, s at an arc length of each way; (..., 5)."""
        position = np.clip(arc / self.STEP, 0.0, len(self.grid) - 1.001)
        index = position.astype(int)
        share = (position - index)[..., None]
        return self.table[way, index] * (1 - share) + self.table[way, index + 1] * share

    def arc_of(self, s: np.ndarray) -> np.ndarray:
        """Return the arc length of each way at s of the centre line; negative behind the start. (J, *s.shape)."""
        flat = np.ravel(s)
        arc = np.stack([np.interp(flat, row, self.grid) for row in self.s])
        behind = np.minimum(flat - self.s[0, 0], 0.0)
        return (arc + behind).reshape(len(self.s), *np.shape(s))

    def offset_at(self, s: np.ndarray) -> np.ndarray:
        """Return the offset d of each way at s of the centre line. (J, *s.shape)."""
        flat = np.ravel(s)
        return np.stack(
            [np.interp(flat, a, b) for a, b in zip(self.s, self.d, strict=True)]
        ).reshape(len(self.s), *np.shape(s))


def _cubic(u, d0, slope, knots):
    """Evaluate the pieces at u; the last d holds beyond the last knot."""
    out = np.full(u.shape, knots[-1][1])
    begin, value, tangent = 0.0, d0, slope
    for end, target in knots:
        inside = (u >= begin) & (u < end)
        length = max(end - begin, 1e-3)
        t = (u[inside] - begin) / length
        out[inside] = (
            value * (1 - 3 * t**2 + 2 * t**3)
            + target * (3 * t**2 - 2 * t**3)
            + tangent * length * (t - 2 * t**2 + t**3)
        )
        begin, value, tangent = end, target, 0.0
    return out

"""The ways across the road that the expert considers: keep the lane, change it, pass what stands, pull out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mose_ros.sim.frenet import Swing, swing_into_lane
from mose_ros.sim.situation import Situation

MAX_TURN = 0.17  # 1/m that a way across the road may add to the road's own curvature
TIGHT_TURN = 0.27  # 1/m, at walking pace and far off the direction of the road
TIGHT_RADII = (3.4, 4.5)  # m that the rear axle turns in a narrow place; the wheels allow 3.0
REAR_AXLE = 1.4  # m from there forward to the centre
PASS_GAP = 0.9  # m beside an obstacle


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way across the road."""

    name: str
    knots: Sequence[tuple[float, float]] | Swing
    bias: float = 0.0
    actor_id: str | None = None


def find_ways(now: Situation) -> list[Way]:
    """Return all ways that make sense here, the route first."""
    s, d = now.s, now.d
    to = lambda offset, seconds: [(s + _length(now, offset, seconds), offset)]  # noqa: E731
    ways = [
        Way(name='route', knots=to(0.0, 3.2)),
        Way(name='route_fast', knots=to(0.0, 2.0), bias=0.03),
    ]
    straight = s + max(4.0 * abs(now.slope) / MAX_TURN, 2.0 * now.speed, 4.0)
    keep = d + 0.3 * now.slope * (straight - s)
    if abs(d) > 0.4 or abs(now.slope) > 0.1:
        # beside the lane with no lane change to wait for
        lost = np.isinf(now.due) and abs(d) > 1.0
        bias = 0.3 if lost else 0.02
        ways.append(Way(name='keep', knots=[(straight, keep)], bias=bias))
    if abs(d) > 1.2 and not np.isinf(now.due):
        for delay in (12.0, 26.0):
            begin = max(straight, s + delay)
            end = begin + max(3.0 * max(now.speed, 3.0), np.sqrt(6.0 * abs(keep) / MAX_TURN))
            ways.append(Way(name='wait', knots=[(begin, keep), (end, 0.0)], bias=0.02))
    if abs(d) > 0.5 and now.speed < 4.0:  # out of a narrow place
        for radius in TIGHT_RADII:
            swing = swing_into_lane((s, d), np.arctan(now.slope), radius, REAR_AXLE)
            if swing is not None:
                ways.append(Way(name='swing', knots=swing, bias=0.03))
    for side, name in ((0.5, 'nudge_left'), (-0.5, 'nudge_right')):
        ways.append(Way(name=name, knots=to(side, 2.6), bias=0.02))
    ways += _passes(now)
    if now.siren is not None:
        ways.append(Way(name='keep_right', knots=to(now.edge(), 2.5)))
    return ways


def _passes(now: Situation) -> list[Way]:
    """Return the ways round the first group of blockers, left and right."""
    others, group = now.others, []
    for index in _blockers(now):
        start = others.s[0, index] - others.half_s[0, index]
        if group and start > max(others.s[0, i] + others.half_s[0, i] for i in group) + 22.0:
            break
        group.append(index)
    if not group:
        return []
    rate = float(np.mean(others.speed[0, group]))
    first = min(others.s[0, i] - others.half_s[0, i] for i in group) - now.half_length
    last = max(others.s[0, i] + others.half_s[0, i] for i in group) + now.half_length + 2.0
    cruise = max(now.speed, 6.0)
    if rate > 0.5:  # it moves on while it is being passed
        meet = np.clip((last - now.s) / max(cruise - rate, 1.0), 0.0, 10.0)
        first, last = first + rate * min(meet, 2.0), last + rate * meet
    ways = []
    for side, name in ((1.0, 'pass_left'), (-1.0, 'pass_right')):
        edge = max(side * others.d[0, i] + others.half_d[0, i] for i in group)
        offset = side * (edge + now.half_width + PASS_GAP)
        room = now.road.left if side > 0 else now.road.right
        widest = (
            float(now.road.at(np.clip((first + last) / 2, 0, None), room)) - now.half_width - 0.3
        )
        if side * offset > widest:
            offset = side * widest
        if side * offset - edge < now.half_width + 0.35 or side * offset < 0:
            continue
        name_of = others.actors[group[0]].id
        if now.speed < 3.0 and first - now.s < 12.0:  # it stands close behind
            for radius in TIGHT_RADII:
                place = (now.s, now.d)
                swing = swing_into_lane(place, np.arctan(now.slope), radius, REAR_AXLE, offset)
                if swing is not None:
                    ways.append(Way(name=name, knots=swing, bias=0.12, actor_id=name_of))
        for seconds in (3.0, 1.8):
            length = _length(now, offset, seconds)
            room_ahead = first - 2.0 - now.s
            if room_ahead < length:
                length = max(room_ahead, _length(now, offset, 0.0))
            begin = now.s + length
            hold = max(last, begin + 1.0)
            back = hold + max(3.0 * cruise, np.sqrt(6.0 * abs(offset) / MAX_TURN))
            knots = [(begin, offset), (hold, offset), (back, 0.0)]
            late = max(first - 2.0 - length, now.s)
            if late > now.s + 3.0 and now.slope < 0.05 and abs(now.d) < 0.5:
                knots = [(late, 0.0), (late + length, offset), *knots[1:]]
            bias = 0.05 + 0.02 * (seconds < 2)
            ways.append(Way(name=name, knots=knots, bias=bias, actor_id=name_of))
    return ways


def _blockers(now: Situation) -> list[int]:
    """Return what stands or crawls on the route ahead and should be passed, nearest first."""
    others, found = now.others, []
    for index, actor in enumerate(others.actors):
        ahead = others.s[0, index] + others.half_s[0, index] - now.s
        inside = abs(others.d[0, index]) - others.half_d[0, index] - now.half_width < 0.5
        if not inside or actor.kind == 'walker' or not -3.0 < ahead < 70.0:
            continue
        if others.fixed[index] or now.crawls(index):
            found.append(index)
    return sorted(found, key=lambda index: others.s[0, index])


def _length(now: Situation, offset: float, seconds: float) -> float:
    """Return how long a way across the road must be, by time and by what the wheels can turn.

    A cubic over L bends by 6 e / L^2 - 4 p / L where it starts and by 6 e / L^2 - 2 p / L where it ends.
    """
    bend = MAX_TURN if abs(now.slope) < 0.3 or now.speed > 3.3 else TIGHT_TURN
    error = offset - now.d
    slope, error = now.slope * np.sign(error), abs(error)
    shortest = [max(now.speed, 2.0) * seconds, 4.0]
    for share in (4.0, 2.0):
        swing = share * slope
        shortest.append((np.sqrt(swing**2 + 24.0 * error * bend) - swing) / (2 * bend))
        if swing**2 > 24.0 * error * bend and swing > 0:  # it must be caught before it overshoots
            overshoot = np.sqrt(swing**2 - 24.0 * error * bend)
            shortest.append((swing + overshoot) / (2 * bend))
    return float(max(shortest))

"""The privileged expert: plans with the whole scene and the actors' own intentions. The ceiling of everything learned.

It samples ways across the road (sideways) times ways of driving along it (lengthwise), rolls all of them out, and takes the
cheapest. It keeps nothing from moment to moment: what it decides follows from the scene, so that a network which sees one
moment can learn it. Frenet sampling after Werling et al. 2010; car following after Treiber et al. 2000 (IDM).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mose_ros.core.types import Actor, Command, Observation, Plan, Scene, Trajectory
from mose_ros.sim.frenet import Frenet, PathTable, Swing, swing_into_lane, wrap

Forecast = Callable[..., 'dict[str, Float[np.ndarray, "T 2"]]']  # (horizon, dt): seconds

_DT, _FINE, _COARSE = (
    0.2,
    15,
    12,
)  # rollouts: 3 s in steps of 0.2 s, then up to 7.8 s in steps of 0.4 s
_TIMES = np.concatenate([_DT * np.arange(1, _FINE + 1), 3.0 + 0.4 * np.arange(1, _COARSE + 1)])
_STEPS = np.diff(_TIMES, prepend=0.0)
_PICK = np.round(_TIMES / _DT).astype(int) - 1  # where those times are in a forecast at 0.2 s
_REACH = 110.0  # m of way that is tabulated

ACCELERATION, COMFORT_BRAKE, HARD_BRAKE = 1.8, 1.8, 7.5  # m/s^2
LATERAL_ACCELERATION = 2.2  # m/s^2, below the 2.5 promised: planning noise comes on top
HEADWAY, LEAD_GAP, STATIC_GAP = (
    1.2,
    2.5,
    8.0,
)  # s and m behind a lead; m to leave for steering round something static
LINE_GAP = 1.0  # m between the front and a stop line
STOP_ZONE = 3.0  # m before the line of a stop sign within which a standstill counts
MAX_TURN = 0.17  # 1/m that a way across the road may add to the road's own curvature
TIGHT_TURN = 0.27  # 1/m, at walking pace and far off the direction of the road
TIGHT_RADII = (
    3.4,
    4.5,
)  # m that the rear axle turns in, to leave a narrow place; the wheels allow 3.0
SWING_SPEED = 2.0  # m/s in such a turn
REAR_AXLE = 1.4  # m from there forward to the centre
CRAWL = (0.8, 2.6)  # m/s: slower is a stop, faster is a lead that gathers speed again
PASS_GAP = 0.9  # m beside an obstacle

DRIVES = (  # ways along: name, share of the allowed speed, whether to yield, fixed braking in m/s^2
    ('cruise', 1.0, False, 0.0),
    ('slower', 0.7, False, 0.0),
    ('slow', 0.4, False, 0.0),
    ('yield', 1.0, True, 0.0),
    ('brake', 1.0, False, 2.5),
    ('brake_hard', 1.0, False, 4.5),
    ('brake_full', 1.0, False, HARD_BRAKE),
)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Why the expert plans what it plans."""

    cause: (
        str  # free | lead | static_ahead | light | stop_sign | crossing | gap | emergency_vehicle
    )
    actor_id: str | None = None
    lateral: str = 'route'  # the way across the road that was taken
    longitudinal: str = 'cruise'  # the way along it


@dataclass(frozen=True, kw_only=True)
class _Others:
    """All actors that can be hit, over the rollout's times, in world and road coordinates. T is 0 (now) and _TIMES."""

    actors: Sequence[Actor]
    xy: Float[np.ndarray, 'T A 2']
    yaw: Float[np.ndarray, 'T A']
    speed: Float[np.ndarray, 'T A']
    size: Float[np.ndarray, 'A 2']
    s: Float[np.ndarray, 'T A']
    d: Float[np.ndarray, 'T A']
    half_s: Float[np.ndarray, 'T A']  # half the extent along the road
    half_d: Float[np.ndarray, 'T A']  # and across it
    along: Float[np.ndarray, 'T A']  # cosine between the actor's and the road's direction
    fixed: np.ndarray  # (A,) bool: parked, cones, barriers


@dataclass(frozen=True, kw_only=True)
class _Wall:
    """A place where the front must stand."""

    distance: float  # m for the centre of the ego vehicle to go
    cause: str
    actor_id: str


@dataclass(frozen=True, kw_only=True)
class _Way:
    """One way across the road."""

    name: str
    knots: Sequence[tuple[float, float]] | Swing
    bias: float = 0.0
    actor_id: str | None = None


class Expert:
    """A Policy that reads the scene. `forecast(horizon, dt)` tells where actors will be; without it they keep their speed."""

    def __init__(self, forecast: Forecast | None = None, horizon: int = 15, dt: float = 0.2):
        self._forecast = forecast
        self._horizon, self._dt = horizon, dt
        self.reason = Decision(cause='free')

    def reset(self) -> None:
        """Forget the last reason; there is nothing else to forget."""
        self.reason = Decision(cause='free')

    def plan(self, observation: Observation | None, scene: Scene) -> Plan:
        """Return the trajectory from here; the pictures are not looked at."""
        return Plan(trajectory=_Moment(scene, self._forecast).solve(self))


class _Moment:
    """All that is worked out for one plan."""

    def __init__(self, scene: Scene, forecast: Forecast | None):
        self.scene, self.ego = scene, scene.ego
        self.road = Frenet(scene.corridor)
        here = np.array([self.ego.x, self.ego.y])
        near = (scene.progress - 8.0, scene.progress + 8.0)
        s, d = self.road.project(here, near)
        self.s, self.d = float(s), float(d)
        self.half_length, self.half_width = self.ego.size[0] / 2, self.ego.size[1] / 2
        error = float(wrap(self.ego.yaw - self.road.at(self.s, self.road.heading)))
        bend = 1.0 - float(self.road.at(self.s, self.road.curvature)) * self.d
        self.slope = float(np.tan(np.clip(error, -0.9, 0.9))) * max(bend, 0.2)
        self.speed = max(self.ego.speed, 0.0)
        self.others = self._watch(forecast)
        self.walls = self._find_walls()
        self.siren = self._find_siren()
        self.due = self._find_due()

    # ---- what is there ----

    def _watch(self, forecast: Forecast | None) -> _Others:
        near = []
        for actor in self.scene.actors:
            if (
                actor.kind in ('vehicle', 'walker', 'static')
                and actor.type_id != 'static.building'
            ):
                distance = np.hypot(actor.x - self.ego.x, actor.y - self.ego.y)
                reach = 30.0 + 8.0 * (np.hypot(*actor.velocity) + 2.0)
                if distance < max(reach, 60.0):
                    near.append((distance, actor))
        actors = [actor for _, actor in sorted(near, key=lambda pair: pair[0])[:24]]
        told = forecast(float(_TIMES[-1]), _DT) if forecast is not None and actors else {}
        count = len(_TIMES) + 1
        xy = np.zeros((count, len(actors), 2))
        for index, actor in enumerate(actors):
            xy[0, index] = actor.x, actor.y
            future = told.get(actor.id)
            xy[1:, index] = future[_PICK] if future is not None else self._guess(actor)
        step = np.diff(xy, axis=0)
        moved = np.hypot(step[..., 0], step[..., 1])
        speed = np.concatenate(
            [[[np.hypot(*a.velocity) for a in actors]], moved / _STEPS[:, None]]
        )
        yaw = (
            np.tile([a.yaw for a in actors], (count, 1)).astype(float).reshape(count, len(actors))
        )
        course = np.arctan2(step[..., 1], step[..., 0])
        for t in range(1, count):  # where it stands it keeps its direction
            yaw[t] = np.where(moved[t - 1] > 0.06, course[t - 1], yaw[t - 1])
        size = np.array([a.size[:2] for a in actors], float).reshape(-1, 2)
        s, d = self.road.project(xy) if actors else (xy[..., 0], xy[..., 0])
        turn = yaw - self.road.at(s, self.road.heading)
        cos, sin = np.cos(turn), np.sin(turn)
        fixed = np.array(
            [a.kind == 'static' or a.type_id == 'vehicle.parked' for a in actors], bool
        )
        return _Others(
            actors=actors,
            xy=xy,
            yaw=yaw,
            speed=speed,
            size=size,
            s=s,
            d=d,
            half_s=(np.abs(cos) * size[:, 0] + np.abs(sin) * size[:, 1]) / 2,
            half_d=(np.abs(sin) * size[:, 0] + np.abs(cos) * size[:, 1]) / 2,
            along=cos,
            fixed=fixed,
        )

    def _guess(self, actor: Actor) -> Float[np.ndarray, 'T 2']:
        """Keep the speed: along the road for vehicles that follow it, straight on for all others."""
        here = np.array([actor.x, actor.y])
        speed = float(np.hypot(*actor.velocity))
        s, d = self.road.project(here)
        turn = np.cos(actor.yaw - self.road.at(float(s), self.road.heading))
        room = max(self.road.at(float(s), self.road.left), self.road.at(float(s), self.road.right))
        if (
            actor.kind == 'vehicle'
            and abs(turn) > 0.9
            and abs(d) < room
            and -60.0 < s < self.road.length
        ):
            x, y, _ = self.road.world(s + np.sign(turn) * speed * _TIMES, np.full(len(_TIMES), d))
            return np.stack([x, y], axis=1)
        return here + np.outer(_TIMES, actor.velocity)

    def _find_walls(self) -> list[_Wall]:
        """Lights and stop signs that ask for a stop."""
        walls = []
        for actor in self.scene.actors:
            if not actor.affects_ego or actor.kind not in ('traffic_light', 'traffic_sign'):
                continue
            to_line = actor.stop_distance  # from the front bumper
            distance = to_line - LINE_GAP
            if actor.kind == 'traffic_light':
                needed = self.speed**2 / (2 * max(to_line - 0.2, 0.1))
                # who brakes for a yellow light already goes on with it
                limit = 3.0 if self.ego.acceleration > -1.0 and self.speed > 3.0 else 4.5
                if actor.state == 'red':
                    limit = HARD_BRAKE
                wanted = actor.state in ('red', 'yellow') and to_line > -0.3 and needed <= limit
                cause = 'light'
            else:
                stood = to_line + self.ego.since_stop <= STOP_ZONE
                wanted, cause = to_line > -0.3 and not stood, 'stop_sign'
            if wanted:
                walls.append(_Wall(distance=distance, cause=cause, actor_id=actor.id))
        return sorted(walls, key=lambda wall: wall.distance)

    def _find_siren(self) -> int | None:
        """Return the emergency vehicle that comes from behind, if there is one."""
        others = self.others
        for index, actor in enumerate(others.actors):
            behind = self.s - others.s[0, index]
            same = others.along[0, index] > 0.5 and abs(others.d[0, index]) < 8.0
            if (
                actor.state == 'siren'
                and same
                and -6.0 < behind < 40.0
                and others.speed[0, index] > 1
            ):
                return index
        return None

    def _find_due(self) -> float:
        """Return by which s a lane change that is due must be done; infinite when none is."""
        lane = float(self.road.at(self.s, self.road.lane_width))
        if abs(self.d) < 0.35 * lane:
            return np.inf
        change = np.array(
            [c in (Command.LANE_LEFT, Command.LANE_RIGHT) for c in self.road.commands]
        )
        if not change[np.searchsorted(self.road.s, self.s) - 1]:
            return np.inf
        ahead = self.road.s > self.s
        ends = np.flatnonzero(ahead[1:] & change[:-1] & ~change[1:])
        return float(self.road.s[ends[0]]) if len(ends) else self.road.length

    # ---- what could be done ----

    def _length(self, offset: float, seconds: float) -> float:
        """Return how long a way across the road must be, by time and by what the wheels can turn.

        A cubic over L bends by 6 e / L^2 - 4 p / L where it starts and by 6 e / L^2 - 2 p / L where it ends.
        """
        bend = MAX_TURN if abs(self.slope) < 0.3 or self.speed > 3.3 else TIGHT_TURN
        error = offset - self.d
        slope, error = self.slope * np.sign(error), abs(error)
        shortest = [max(self.speed, 2.0) * seconds, 4.0]
        for share in (4.0, 2.0):
            swing = share * slope
            shortest.append((np.sqrt(swing**2 + 24.0 * error * bend) - swing) / (2 * bend))
            if (
                swing**2 > 24.0 * error * bend and swing > 0
            ):  # it must be caught before it overshoots
                overshoot = np.sqrt(swing**2 - 24.0 * error * bend)
                shortest.append((swing + overshoot) / (2 * bend))
        return float(max(shortest))

    def _ways(self) -> list[_Way]:
        s, d = self.s, self.d
        to = lambda offset, seconds: [(s + self._length(offset, seconds), offset)]  # noqa: E731
        ways = [
            _Way(name='route', knots=to(0.0, 3.2)),
            _Way(name='route_fast', knots=to(0.0, 2.0), bias=0.03),
        ]
        straight = s + max(4.0 * abs(self.slope) / MAX_TURN, 2.0 * self.speed, 4.0)
        keep = d + 0.3 * self.slope * (straight - s)
        if abs(d) > 0.4 or abs(self.slope) > 0.1:
            lost = (
                np.isinf(self.due) and abs(d) > 1.0
            )  # beside the lane with no lane change to wait for
            bias = 0.3 if lost else 0.02
            ways.append(_Way(name='keep', knots=[(straight, keep)], bias=bias))
        if abs(d) > 1.2 and not np.isinf(self.due):
            for delay in (12.0, 26.0):
                begin = max(straight, s + delay)
                end = begin + max(3.0 * max(self.speed, 3.0), np.sqrt(6.0 * abs(keep) / MAX_TURN))
                ways.append(_Way(name='wait', knots=[(begin, keep), (end, 0.0)], bias=0.02))
        if abs(d) > 0.5 and self.speed < 4.0:  # out of a narrow place
            for radius in TIGHT_RADII:
                swing = swing_into_lane((s, d), np.arctan(self.slope), radius, REAR_AXLE)
                if swing is not None:
                    ways.append(_Way(name='swing', knots=swing, bias=0.03))
        for side in (0.5, -0.5):
            ways.append(
                _Way(
                    name='nudge_left' if side > 0 else 'nudge_right',
                    knots=to(side, 2.6),
                    bias=0.02,
                )
            )
        ways += self._passes()
        if self.siren is not None:
            ways.append(_Way(name='keep_right', knots=to(self._edge(), 2.5)))
        return ways

    def _edge(self) -> float:
        """Return the offset of who keeps to the right."""
        room = float(self.road.at(self.s + 8.0, self.road.right))
        return -float(np.clip(room - self.half_width - 0.35, 0.0, 1.5))

    def _blockers(self) -> list[int]:
        """Return what stands or crawls on the route ahead and should be passed, nearest first."""
        others, found = self.others, []
        for index, actor in enumerate(others.actors):
            ahead = others.s[0, index] + others.half_s[0, index] - self.s
            inside = abs(others.d[0, index]) - others.half_d[0, index] - self.half_width < 0.5
            if not inside or actor.kind == 'walker' or not -3.0 < ahead < 70.0:
                continue
            if others.fixed[index] or self._crawls(index):
                found.append(index)
        return sorted(found, key=lambda index: others.s[0, index])

    def _crawls(self, index: int) -> bool:
        """Say whether a vehicle is slow by itself: not for a line, a queue or a junction."""
        others, actor = self.others, self.others.actors[index]
        place = others.s[0, index]
        slow = others.speed[:, index].max() < CRAWL[1] and others.along[0, index] > 0.8
        junction = self.road.junction[
            np.searchsorted(self.road.s, [place, place + 25.0]).clip(max=len(self.road.s) - 1)
        ]
        lines = any(a.affects_ego for a in self.scene.actors)
        return (
            slow
            and others.speed[0, index] > CRAWL[0]
            and not actor.state
            and not junction.any()
            and not lines
        )

    def _passes(self) -> list[_Way]:
        """Return the ways round the first group of blockers, left and right."""
        others, group = self.others, []
        for index in self._blockers():
            start = others.s[0, index] - others.half_s[0, index]
            if group and start > max(others.s[0, i] + others.half_s[0, i] for i in group) + 22.0:
                break
            group.append(index)
        if not group:
            return []
        rate = float(np.mean(others.speed[0, group]))
        first = min(others.s[0, i] - others.half_s[0, i] for i in group) - self.half_length
        last = max(others.s[0, i] + others.half_s[0, i] for i in group) + self.half_length + 2.0
        cruise = max(self.speed, 6.0)
        if rate > 0.5:  # it moves on while it is being passed
            meet = np.clip((last - self.s) / max(cruise - rate, 1.0), 0.0, 10.0)
            first, last = first + rate * min(meet, 2.0), last + rate * meet
        ways = []
        for side, name in ((1.0, 'pass_left'), (-1.0, 'pass_right')):
            edge = max(side * others.d[0, i] + others.half_d[0, i] for i in group)
            offset = side * (edge + self.half_width + PASS_GAP)
            room = self.road.left if side > 0 else self.road.right
            widest = (
                float(self.road.at(np.clip((first + last) / 2, 0, None), room))
                - self.half_width
                - 0.3
            )
            if side * offset > widest:
                offset = side * widest
            if side * offset - edge < self.half_width + 0.35 or side * offset < 0:
                continue
            name_of = others.actors[group[0]].id
            if self.speed < 3.0 and first - self.s < 12.0:  # it stands close behind
                for radius in TIGHT_RADII:
                    place = (self.s, self.d)
                    swing = swing_into_lane(
                        place, np.arctan(self.slope), radius, REAR_AXLE, offset
                    )
                    if swing is not None:
                        ways.append(_Way(name=name, knots=swing, bias=0.12, actor_id=name_of))
            for seconds in (3.0, 1.8):
                length = self._length(offset, seconds)
                room_ahead = first - 2.0 - self.s
                if room_ahead < length:
                    length = max(room_ahead, self._length(offset, 0.0))
                begin = self.s + length
                hold = max(last, begin + 1.0)
                back = hold + max(3.0 * cruise, np.sqrt(6.0 * abs(offset) / MAX_TURN))
                knots = [(begin, offset), (hold, offset), (back, 0.0)]
                late = max(first - 2.0 - length, self.s)
                if late > self.s + 3.0 and self.slope < 0.05 and abs(self.d) < 0.5:
                    knots = [(late, 0.0), (late + length, offset), *knots[1:]]
                ways.append(
                    _Way(
                        name=name,
                        knots=knots,
                        bias=0.05 + 0.02 * (seconds < 2),
                        actor_id=name_of,
                    )
                )
        return ways

    # ---- rolling out and choosing ----

    def solve(self, expert: 'Expert') -> Trajectory:
        """Roll out every way with every drive, choose, and write down why."""
        ways = self._ways()
        paths = PathTable(
            self.road, (self.s, self.d), self.slope, [way.knots for way in ways], _REACH
        )
        caps = self._speed_caps(paths)
        way = np.repeat(np.arange(len(ways)), len(DRIVES))
        roll = self._roll(paths, caps, way, len(ways))
        cost = self._cost(paths, roll, way, ways)
        best = int(np.argmin(cost))
        expert.reason = self._explain(ways[way[best]], DRIVES[best % len(DRIVES)], roll, best)
        return self._trajectory(paths, roll, way, best, expert)

    def _speed_caps(self, paths: PathTable):
        """Return the speed that limit and curves allow at each place, so that nobody must brake above comfort."""
        limit = np.interp(paths.s, self.road.s, self.road.speed_limit)
        bend = np.sqrt(LATERAL_ACCELERATION / np.maximum(np.abs(paths.curvature), 1e-3))
        cap = np.minimum(limit, bend)
        tight = paths.swings[:, None] & (np.abs(paths.curvature) > 0.1)
        cap = np.where(tight, np.minimum(cap, SWING_SPEED), cap)
        if self.siren is not None:
            cap = np.minimum(cap, 2.5)
        energy = cap**2 + 2 * COMFORT_BRAKE * paths.grid
        lowest = np.minimum.accumulate(energy[:, ::-1], axis=1)[:, ::-1]
        return np.sqrt(np.maximum(lowest - 2 * COMFORT_BRAKE * paths.grid, 0.0))

    def _roll(self, paths: PathTable, caps, way, count):
        others = self.others
        _, share, yields, braking = (np.array(column) for column in zip(*DRIVES, strict=True))
        share, braking = np.tile(share, count), np.tile(braking, count)
        yields = np.tile(yields, count)
        # where everyone is on each way: (J, T, A)
        arc = paths.arc_of(others.s)
        beside = np.abs(others.d - paths.offset_at(others.s))
        on_way = beside < others.half_d + self.half_width + np.where(others.fixed, 0.3, 0.35)
        on_way &= (arc > 0.0) & (others.s < paths.s[:, -1, None, None])
        rear = arc - others.half_s - self.half_length
        speed_along = others.speed * others.along
        crawling = np.array([self._crawls(index) for index in range(len(others.actors))], bool)
        against = (others.along[0] < 0.5) & (others.size[:, 0] > 2.0)
        keep = np.where(others.fixed | crawling | against, STATIC_GAP, LEAD_GAP)
        yield_at = self._conflicts(on_way, rear, arc)
        walls = self._way_walls(paths)
        stop_at = np.where(yields, np.minimum(yield_at[way], walls[way]), walls[way])

        n = len(way)
        position, speed = np.zeros(n), np.full(n, self.speed)
        arcs, speeds, leads = [], [], []
        for t, dt in enumerate(_STEPS):
            index = np.clip((position + 0.4 * speed) / paths.STEP, 0, caps.shape[1] - 1).astype(
                int
            )
            allowed = caps[way, index] * share
            accel = np.clip((allowed - speed) / 0.7, -3.5, ACCELERATION)
            if others.actors:
                gap = np.where(
                    on_way[way, t] & (arc[way, t] > position[:, None]),
                    rear[way, t] - position[:, None],
                    np.inf,
                )
                lead = np.argmin(gap, axis=1)
                rows = np.arange(n)
                follow = _idm(gap[rows, lead], speed, speed_along[t, lead], keep[lead], allowed)
                leads.append(
                    np.where(np.isfinite(gap[rows, lead]) & (follow < accel - 0.1), lead, -1)
                )
                accel = np.minimum(accel, follow)
            accel = np.minimum(accel, _stop(stop_at - position, speed))
            accel = np.where(braking > 0, -braking, np.clip(accel, -HARD_BRAKE, None))
            after = np.maximum(speed + accel * dt, 0.0)
            position = position + 0.5 * (speed + after) * dt
            speed = after
            arcs.append(position)
            speeds.append(speed)
        return {
            'arc': np.stack(arcs, axis=1),
            'speed': np.stack(speeds, axis=1),
            'lead': np.stack(leads, axis=1) if leads else np.full((n, 1), -1),
            'on_way': on_way,
        }

    def _way_walls(self, paths: PathTable):
        """Return where each way must be stopped on: at a line, or where it is still outside the lane it must be in. (J,)"""
        wall = min([w.distance for w in self.walls], default=np.inf)
        if np.isinf(self.due):
            return np.full(len(paths.s), wall)
        outside = np.abs(paths.d) > 0.4 * float(self.road.at(self.s, self.road.lane_width))
        late = (outside & (paths.s > self.due + 6.0)).any(axis=1)
        # where it waits there must be room left to swing across
        stand = max(self.due - 10.0 - self.s, 0.3)
        return np.minimum(np.where(late, stand, np.inf), wall)

    def _conflicts(self, on_way, rear, arc):
        """Return for each way where to stand so that those who will come onto it have passed. (J,)"""
        others = self.others
        if not others.actors:
            return np.full(len(on_way), np.inf)
        entering = on_way.any(axis=1) & ~(on_way[:, 0] & (others.along[0] > 0.7))  # (J, A)
        entering &= ~others.fixed
        place = np.where(on_way, rear, np.inf).min(axis=1)
        place = np.where(entering, place - 1.5, np.inf)
        return place.min(axis=1)

    def _cost(self, paths: PathTable, roll, way, ways):
        arc, speed = roll['arc'], roll['speed']
        state = paths.look_up(way[:, None], arc)  # (C, T, 5)
        accel = np.diff(speed, axis=1, prepend=np.full((len(way), 1), self.speed)) / _STEPS
        weight = _STEPS / _STEPS.sum()
        index = np.clip(arc / paths.STEP, 0, len(paths.grid) - 1).astype(int)
        bend = paths.curvature[way[:, None], index]
        cruise = float(self.road.at(self.s, self.road.speed_limit))
        lane = float(self.road.at(self.s, self.road.lane_width))
        d, s = state[..., 3], state[..., 4]

        cost = 1.0 * ((cruise - np.minimum(speed, cruise)) / cruise) @ weight
        cost += 0.02 * np.square(np.maximum(np.abs(accel) - 0.8, 0.0)) @ weight
        cost += 0.15 * np.maximum(np.max(-accel, axis=1) - 2.7, 0.0)
        cost += 0.02 * np.square(speed**2 * bend) @ weight
        aim = 0.0 if self.siren is None else self._edge()
        cost += (0.06 if np.isinf(self.due) else 0.14) * np.abs(d - aim) @ weight
        cost += (
            0.10
            * (d - self.half_width > np.interp(s, self.road.s, self.road.own_left) - 1.0)
            @ weight
        )
        left = d + self.half_width + 0.25 - np.interp(s, self.road.s, self.road.left)
        right = -d + self.half_width + 0.25 - np.interp(s, self.road.s, self.road.right)
        # who is lost already may leave the road on the way back rather than stand for ever
        price = 6.0 if abs(self.slope) < 0.35 and abs(self.d) < 0.5 * lane else 2.0
        outside = np.maximum(np.maximum(left, right), 0.0)
        cost += (price if self.speed > 0.5 or price > 2.0 else 0.3) * outside @ weight
        cost += np.array([w.bias for w in ways])[way]
        wall = min([w.distance for w in self.walls], default=np.inf)
        over = np.clip(arc[:, -1] - wall - LINE_GAP / 2, 0.0, 1.0)
        cost += 5.0 * over
        if self.others.actors:
            cost += self._collision_cost(state, roll, way, speed)
        return cost

    def _collision_cost(self, state, roll, way, speed):
        """Judge all candidates against all actors: discs along the ego vehicle against oriented boxes."""
        others = self.others
        x, y, heading = (state[..., k, None] for k in range(3))
        reach = np.linspace(-1, 1, 4) * (self.half_length - self.half_width)
        px = (x + reach * np.cos(heading))[:, :, None, :]  # (C, T, 1, 4)
        py = (y + reach * np.sin(heading))[:, :, None, :]
        cos, sin = np.cos(others.yaw[1:])[None, ..., None], np.sin(others.yaw[1:])[None, ..., None]
        dx = px - others.xy[None, 1:, :, 0, None]
        dy = py - others.xy[None, 1:, :, 1, None]
        ahead, side = dx * cos + dy * sin, np.abs(dy * cos - dx * sin)
        half = others.size[:, :, None] / 2
        out_side = np.maximum(side - half[:, 1], 0.0)
        out = np.maximum(np.abs(ahead) - half[:, 0], 0.0)
        clear = np.sqrt((out**2 + out_side**2).min(axis=-1)) - self.half_width  # (C, T, A)
        # time gaps: one that moves takes up the road before and behind it as well
        moving = others.speed[1:] > 0.5
        foreign = moving & ~((others.along[1:] > 0.7) & (np.abs(others.d[0] - self.d) < 1.2))
        before = np.where(foreign, 1.3, 0.0) * others.speed[1:]
        after = np.where(foreign, 0.5, 0.0) * others.speed[1:]
        stretch = np.where(ahead > 0, before[None, ..., None], after[None, ..., None])
        out = np.maximum(np.abs(ahead) - half[:, 0] - stretch, 0.0)
        gap = np.sqrt((out**2 + out_side**2).min(axis=-1)) - self.half_width

        behind = others.s[0] + others.half_s[0] < self.s - self.half_length + 0.5
        followers = behind & (others.along[0] > 0.5) & (np.abs(others.d[0] - self.d) < 1.5)
        walkers = np.array([a.kind == 'walker' for a in others.actors])
        margin = 0.2 + np.where(others.fixed, 0.0, 0.04 * _TIMES[:, None])
        margin = np.where(walkers, margin + 0.2, margin)
        # who is that near already need not stand for ever: it must only not come nearer
        margin = np.minimum(margin, self._clear_now() - 0.03)
        hit = np.where(followers, 0.0, np.maximum(margin - clear, 0.0))
        touched = hit > 0
        weight = _STEPS / _STEPS.sum()
        # the sooner and the faster the worse
        severe = touched * (1.0 + np.minimum(hit, 1.0)) * (0.3 + 0.1 * speed[..., None])
        cost = 12.0 * np.max(severe * np.exp(-_TIMES / 6.0)[:, None], axis=(1, 2))
        cost += 8.0 * (severe.max(axis=2) @ weight)
        soft = np.where(walkers, 1.0, 0.6)
        near = (
            np.where(followers, 0.0, np.maximum(soft - clear, 0.0) / soft)
            * np.minimum(speed / 4.0, 1.0)[..., None]
        )
        cost += 0.5 * (near.max(axis=2) ** 2) @ weight
        cut = np.where(followers, 0.0, gap < 0.3) * np.minimum(0.3 + speed / 3.0, 1.0)[..., None]
        cost += 1.2 * cut.max(axis=(1, 2)) + 1.5 * (cut.max(axis=2) @ weight)
        return cost

    def _clear_now(self):
        """Return the room to each actor as the ego vehicle stands. (A,)"""
        others = self.others
        reach = np.linspace(-1, 1, 4) * (self.half_length - self.half_width)
        dx = self.ego.x + reach * np.cos(self.ego.yaw) - others.xy[0, :, 0, None]
        dy = self.ego.y + reach * np.sin(self.ego.yaw) - others.xy[0, :, 1, None]
        cos, sin = np.cos(others.yaw[0])[:, None], np.sin(others.yaw[0])[:, None]
        out = np.maximum(np.abs(dx * cos + dy * sin) - others.size[:, :1] / 2, 0.0)
        out_side = np.maximum(np.abs(dy * cos - dx * sin) - others.size[:, 1:] / 2, 0.0)
        return np.sqrt((out**2 + out_side**2).min(axis=-1)) - self.half_width

    def _explain(self, way: _Way, drive, roll, best: int) -> Decision:
        def say(cause, actor):
            return Decision(cause=cause, actor_id=actor, lateral=way.name, longitudinal=drive[0])

        actors = self.others.actors
        if self.siren is not None:
            return say('emergency_vehicle', actors[self.siren].id)
        if way.actor_id is not None:
            return say('static_ahead', way.actor_id)
        slowed = roll['arc'][best, _FINE] < 0.95 * self.speed * 3.2 or self.speed < 1.0
        if self.walls and slowed:
            wall = self.walls[0]
            if (
                wall.distance < self.speed**2 / (2 * COMFORT_BRAKE) + 4.0
                and roll['arc'][best, -1] < wall.distance + 0.5
            ):
                return say(wall.cause, wall.actor_id)
        leads = roll['lead'][best][: _FINE // 2]
        lead = int(leads[leads >= 0][0]) if (leads >= 0).any() else -1
        if drive[0] != 'cruise' and not (lead >= 0 and drive[0] == 'slower'):
            entering = self._nearest_entering(roll, best // len(DRIVES))
            if entering is not None:
                walker = actors[entering].kind == 'walker'
                return say('crossing' if walker else 'gap', actors[entering].id)
        if lead >= 0:
            cause = 'static_ahead' if self.others.fixed[lead] else 'lead'
            if actors[lead].kind == 'walker':
                cause = 'crossing'
            return say(cause, actors[lead].id)
        return say('free', None)

    def _nearest_entering(self, roll, way: int) -> int | None:
        others, on_way = self.others, roll['on_way'][way]
        if not others.actors:
            return None
        entering = on_way.any(axis=0) & ~(on_way[0] & (others.along[0] > 0.7)) & ~others.fixed
        if not entering.any():
            return None
        when = np.where(entering, np.argmax(on_way, axis=0), len(on_way))
        return int(np.argmin(when))

    def _trajectory(self, paths: PathTable, roll, way, best: int, expert: 'Expert') -> Trajectory:
        times = expert._dt * np.arange(1, expert._horizon + 1)
        arc = np.interp(
            times, np.concatenate([[0.0], _TIMES]), np.concatenate([[0.0], roll['arc'][best]])
        )
        state = paths.look_up(np.full(len(arc), way[best]), arc)
        offset = state[:, :2] - (self.ego.x, self.ego.y)
        cos, sin = np.cos(self.ego.yaw), np.sin(self.ego.yaw)
        xy = offset @ np.array([[cos, -sin], [sin, cos]])
        return Trajectory(time=self.scene.time, dt=expert._dt, xy=xy)


def _idm(gap, speed, lead_speed, keep, allowed):
    """Return the acceleration behind a lead; gap between the bumpers (Treiber et al. 2000, eq. 2 and 3)."""
    closing = speed * (speed - lead_speed) / (2 * np.sqrt(ACCELERATION * 2.5))
    wanted = keep + np.maximum(HEADWAY * speed + closing, 0.0)
    free = 1.0 - (speed / np.maximum(allowed, 0.5)) ** 4
    accel = ACCELERATION * (np.minimum(free, 1.0) - (wanted / np.maximum(gap, 0.3)) ** 2)
    return np.where(gap <= keep * 0.5, -HARD_BRAKE * (speed > 0), accel)


def _stop(distance, speed):
    """Return the acceleration that ends at `distance`, or lets it run while braking needn't begin yet."""
    needed = speed**2 / (2 * np.maximum(distance, 0.05))
    allowed = np.sqrt(2 * COMFORT_BRAKE * np.maximum(distance - 0.2 * speed, 0.0))
    return np.where(
        needed > COMFORT_BRAKE, -needed, np.minimum((allowed - speed) / 0.5, ACCELERATION)
    )

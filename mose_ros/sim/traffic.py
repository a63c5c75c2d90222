"""Everything on the road but the ego: cars and walkers that follow paths, lights, signs, and things that stand.

All of it is kinematic and repeatable. Cars keep their distance by the intelligent driver model (Treiber 2000) to whatever
stands or drives in their way, the ego included; scenarios steer them through `script`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from mose_ros.core.types import Actor, EgoState
from mose_ros.sim.town import Path

DT = 0.1  # s of one tick
HEADWAY_S, STANDSTILL_M, COMFORT_ACCELERATION, COMFORT_BRAKING = 1.2, 2.5, 1.8, 2.5
HARDEST_BRAKING = 8.0  # m/s^2
LATERAL_COMFORT = 2.2  # m/s^2 in curves
BRAKE_LIGHTS = 1.5  # m/s^2 of deceleration from which they are lit

CAR = (4.5, 1.85, 1.5)
TRUCK = (8.0, 2.4, 3.0)
VAN = (5.6, 2.0, 2.4)
WALKER = (0.5, 0.5, 1.75)


@dataclass
class Body:
    """Anything with a box: what stands still is no more than this."""

    id: str
    kind: str
    type_id: str
    size: tuple[float, float, float]
    x: float = 0.0
    y: float = 0.0
    yaw: float = 0.0
    velocity: tuple[float, float] = (0.0, 0.0)
    state: str = ''

    def actor(self) -> Actor:
        """Return what the scene says of it."""
        return Actor(
            id=self.id,
            kind=self.kind,
            type_id=self.type_id,
            x=self.x,
            y=self.y,
            yaw=self.yaw,
            size=self.size,
            velocity=self.velocity,
            state=self.state,
        )


@dataclass
class Moment:
    """What scripts may look at."""

    time: float
    ego: EgoState
    ego_s: float  # along the route
    ego_d: float

    @property
    def ego_front(self) -> float:
        """Where the ego's front bumper is along the route."""
        return self.ego_s + self.ego.size[0] / 2


@dataclass
class Mover(Body):
    """A car or walker on a path. `script`, called at each tick, may change `cruise`, `goal_d`, `pace` and the like."""

    path: Path = None
    s: float = 0.0
    d: float = 0.0
    v: float = 0.0
    cruise: float = 8.0  # m/s wanted
    goal_d: float = 0.0  # where across the path it wants to be
    side_speed: float = 1.2  # m/s at which it gets there
    pace: list[tuple[float, float]] = field(
        default_factory=list
    )  # (s, m/s^2) it does next, whatever comes
    keeps_distance: bool = True
    blind_to: frozenset[str] = frozenset()  # ids it doesn't react to
    script: Callable[['Mover', Moment], None] | None = None
    lights: list['Light'] = field(default_factory=list)  # that it obeys
    gone: bool = False

    def __post_init__(self):
        self.goal_d = self.d
        self.siren = self.state == 'siren'
        self._place(0.0)

    def tick(self, moment: Moment, others: Iterable[Body]) -> None:
        """Move on by one tick."""
        if self.script:
            self.script(self, moment)
        if self.pace:
            seconds, acceleration = self.pace[0]
            self.pace[0] = (seconds - DT, acceleration)
            if seconds - DT < 1e-6:
                self.pace.pop(0)
        elif self.keeps_distance:
            acceleration = self._keep_distance(others)
        else:
            acceleration = float(np.clip((self.cruise - self.v) / DT, -3, 2))
        acceleration = max(acceleration, -self.v / DT)
        self.s += self.v * DT + 0.5 * acceleration * DT * DT
        self.v = max(0.0, self.v + acceleration * DT)
        move = float(np.clip(self.goal_d - self.d, -self.side_speed * DT, self.side_speed * DT))
        self.d += move
        self._place(move / DT)
        if not self.siren:
            self.state = (
                'braking' if acceleration < -BRAKE_LIGHTS and self.kind == 'vehicle' else ''
            )
        if self.s > self.path.length + 3:
            self.gone = True

    def _place(self, side: float) -> None:
        self.x, self.y, yaw = self.path.pose(self.s, self.d)
        self.yaw = yaw + (float(np.arctan2(side, max(self.v, 3.0))) if side else 0.0)
        c, s = np.cos(yaw), np.sin(yaw)
        self.velocity = (float(self.v * c - side * s), float(self.v * s + side * c))

    def _keep_distance(self, others: Iterable[Body]) -> float:
        wanted = max(0.1, min(self.cruise, curve_speed(self.path, self.s, self.v)))
        free = COMFORT_ACCELERATION * (1 - (self.v / wanted) ** 4)
        acceleration = max(free, -COMFORT_BRAKING) if self.cruise > 0 else -COMFORT_BRAKING
        for gap, speed in self._leaders(others):
            closing = (
                self.v * (self.v - speed) / (2 * np.sqrt(COMFORT_ACCELERATION * COMFORT_BRAKING))
            )
            keep = STANDSTILL_M + max(0.0, self.v * HEADWAY_S + closing)
            push = COMFORT_ACCELERATION * (keep / max(gap, 0.3)) ** 2
            acceleration = min(acceleration, COMFORT_ACCELERATION - push)
        return float(np.clip(acceleration, -HARDEST_BRAKING, COMFORT_ACCELERATION))

    def _leaders(self, others: Iterable[Body]) -> Iterable[tuple[float, float]]:
        for light in self.lights:
            gap = light.line - self.s - self.size[0] / 2
            if gap > 0 and (
                light.state == 'red' or (light.state == 'yellow' and gap > self.v**2 / 6)
            ):
                yield gap + STANDSTILL_M - 0.8, 0.0
        for other in others:
            if other is self or other.id in self.blind_to:
                continue
            away_x, away_y = other.x - self.x, other.y - self.y
            if away_x * away_x + away_y * away_y > 2500:
                continue
            s, d = self.path.project(other.x, other.y, self.s + 22)
            if s <= self.s:
                continue
            turn = other.yaw - self.path.pose(s)[2]
            c, n = abs(np.cos(turn)), abs(np.sin(turn))
            long_half = (c * other.size[0] + n * other.size[1]) / 2
            wide_half = (n * other.size[0] + c * other.size[1]) / 2
            near_d = min(abs(d - self.d), abs(d - self.goal_d))
            if near_d < wide_half + self.size[1] / 2 + 0.3:
                speed = other.velocity[0] * np.cos(other.yaw - turn) + other.velocity[1] * np.sin(
                    other.yaw - turn
                )
                yield s - self.s - long_half - self.size[0] / 2, float(max(speed, 0.0))

    def forecast(self, count: int, dt: float) -> Float[np.ndarray, 'T 2']:
        """Return where it will be, row i at (i + 1) * dt: its script as far as it is known, else on at its speed."""
        s, d, v, pace = self.s, self.d, self.v, list(self.pace)
        rows = np.empty((count, 2))
        for i in range(count):
            left = dt
            while left > 1e-9:
                span, acceleration = left, 0.0
                if not self.keeps_distance:
                    acceleration = float(np.clip((self.cruise - v) / span, -3, 2))
                if pace:
                    span, acceleration = min(left, pace[0][0]), pace[0][1]
                    rest = pace[0][0] - span
                    pace = [(rest, acceleration), *pace[1:]] if rest > 1e-6 else pace[1:]
                new = max(0.0, v + acceleration * span)
                s, v, left = s + (v + new) / 2 * span, new, left - span
            d += float(np.clip(self.goal_d - d, -self.side_speed * dt, self.side_speed * dt))
            rows[i] = self.path.pose(s, d)[:2]
        return rows


def curve_speed(path: Path, s: float, v: float) -> float:
    """Return the speed that is comfortable in the bends of the next second and a half."""
    first = min(max(int(s / path.step), 0), len(path.yaw) - 2)
    last = min(first + 2 + int(1.5 * v / path.step), len(path.yaw) - 1)
    bend = np.abs(np.diff(path.yaw[first : last + 1])).max(initial=0.0) / path.step
    return float(np.sqrt(LATERAL_COMFORT / max(bend, 1e-3)))


@dataclass
class Light(Body):
    """A traffic light or stop sign with its line. A light runs through its phases, a sign has none."""

    path: Path = None  # of the traffic that it governs
    line: float = 0.0  # s of its stop line on that path, and of the movers that obey it
    phases: list[tuple[str, float]] = field(default_factory=list)  # (state, s), repeated
    offset: float = 0.0  # s into the phases at time 0
    for_ego: bool = True
    passed: bool = False

    def set_time(self, time: float) -> None:
        """Show what is due at that time."""
        if not self.phases:
            return
        moment = (time + self.offset) % sum(seconds for _, seconds in self.phases)
        for state, seconds in self.phases:
            if moment < seconds:
                self.state = state
                return
            moment -= seconds

    def seen_from(self, moment: Moment) -> Actor:
        """Return the actor, with its distance to the ego."""
        actor = self.actor()
        distance = self.line - moment.ego_front
        governs = self.for_ego and not self.passed
        values = dict(vars(actor))
        values.update(
            affects_ego=governs and distance < 60,
            stop_distance=distance if governs else float('inf'),
        )
        return Actor(**values)


def corners(x: float, y: float, yaw: float, size: tuple[float, ...]) -> Float[np.ndarray, '4 2']:
    """Return the corners of an oriented box."""
    c, s = np.cos(yaw), np.sin(yaw)
    along, across = np.array([c, s]) * size[0] / 2, np.array([-s, c]) * size[1] / 2
    centre = np.array([x, y])
    return np.stack(
        [
            centre + along + across,
            centre + along - across,
            centre - along - across,
            centre - along + across,
        ]
    )


def overlap(one: Float[np.ndarray, '4 2'], other: Float[np.ndarray, '4 2']) -> bool:
    """Say whether two oriented boxes touch (separating axes)."""
    for box in (one, other):
        for axis in (box[0] - box[1], box[1] - box[2]):
            a, b = one @ axis, other @ axis
            if a.max() < b.min() or b.max() < a.min():
                return False
    return True

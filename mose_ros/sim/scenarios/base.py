"""What an episode is, and what the scenario families share.

Each family draws everything from one generator, so a seed is an episode. What comes suddenly comes so that a driver who
reacts within half a second and brakes with 6 m/s^2 can still stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mose_ros.core.types import Command
from mose_ros.sim.physics import Physics
from mose_ros.sim.town import LEFT, RIGHT, STRAIGHT, Block, Path, Route, Town
from mose_ros.sim.traffic import CAR, TRUCK, VAN, WALKER, Body, Light, Mover

GOAL_BEFORE_END_M = 12.0
BAY_WIDTH = 2.4
ARM_M = 35.0  # length of the straight that MetaDrive hangs on each arm of a junction
BACK = 3  # the arm that the ego comes from, beside RIGHT, STRAIGHT and LEFT


@dataclass
class Episode:
    """All that a family decides."""

    town: Town
    route: Route
    start_s: float
    goal_s: float
    start_d: float = 0.0
    start_speed: float = 0.0
    movers: list[Mover] = field(default_factory=list)
    statics: list[Body] = field(default_factory=list)
    lights: list[Light] = field(default_factory=list)
    siren: Mover | None = None
    may_use_opposing: bool = False
    lane_change_by: float | None = None  # s by which the ego must be in the route's lane
    time_limit: float = 120.0


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """A crossing or T, its arms prolonged; arms are RIGHT, STRAIGHT, LEFT (as the ego sees them) and BACK."""

    town: Town
    lengths: dict[int, float]  # m of each arm up to the junction

    def out_node(self, arm: int) -> str:
        """Return the node at which an arm ends for who leaves the junction by it."""
        return '->' if arm == BACK else f'{2 + sorted(self.lengths).index(arm)}S0_0_'

    def path(self, come: int, go: int, lane: int = -1) -> Path:
        """Return the way from the far end of one arm to the far end of another."""
        out = self.out_node(come)
        return self.town.path(out[1:] if come == BACK else f'-{out}', self.out_node(go), lane)


class Maker:
    """The generator, the roads and the habit of giving everything a name."""

    def __init__(self, physics: Physics, seed: int, index: int):
        self.random = np.random.default_rng([seed, index])
        self.physics = physics
        self.seed = seed
        self.count = 0
        self.limit = self.uniform(8.0, 9.0)

    def uniform(self, low: float, high: float) -> float:
        """Draw a number."""
        return float(self.random.uniform(low, high))

    def chance(self, share: float) -> bool:
        """Draw yes or no."""
        return bool(self.random.uniform() < share)

    def pick(self, *choices):
        """Draw one of these."""
        return choices[int(self.random.integers(len(choices)))]

    # ---- roads ----

    def town(self, blocks: Sequence[Block], lanes: int, first: float) -> Town:
        """Lay the roads after a straight of `first` m."""
        return self.physics.make_town(
            blocks,
            lanes=lanes,
            width=self.uniform(3.35, 3.75),
            first=first,
            heading=self.uniform(-np.pi, np.pi),
            seed=self.seed,
        )

    def curve(self, angle: tuple[float, float], length: tuple[float, float]) -> Block:
        """Draw a bend of so many degrees and the straight after it."""
        return Block(
            letter='C',
            config={
                'length': self.uniform(*length),
                'radius': self.uniform(22, 50),
                'angle': self.uniform(*angle),
                'dir': self.pick(0, 1),
            },
        )

    def road(
        self, lanes: int, length: tuple[float, float], *, bend: bool = True
    ) -> tuple[Town, str]:
        """Lay a long straight, perhaps with a bend at its end; return it and its last node."""
        first = self.uniform(*length)
        if bend and self.chance(0.5):
            return self.town([self.curve((15, 50), (20, 40))], lanes, first), '1C0_1_'
        return self.town([Block(letter='S', config={'length': 40.0})], lanes, first), '1S0_0_'

    def crossing(
        self, lanes: int, first: float, arms: dict[int, float], missing: int | None = None
    ) -> Crossing:
        """Lay a crossing (a T where an arm is missing) `first` m ahead, with arms of these lengths."""
        letter, config = ('X', {}) if missing is None else ('T', {'t_type': missing})
        there = [arm for arm in (RIGHT, STRAIGHT, LEFT) if arm != missing]
        lengths = {arm: max(arms.get(arm, 60.0), ARM_M + 10) for arm in there}
        blocks = [Block(letter=letter, config=config)] + [
            Block(letter='S', parent=1, socket=arm, config={'length': lengths[arm] - ARM_M})
            for arm in there
        ]
        return Crossing(town=self.town(blocks, lanes, first), lengths=lengths)

    def episode(self, town: Town, end: str, lane: int, **more) -> Episode:
        """Make the episode of a route from the first road to a node."""
        route = Route(town, town.way('>', end, lane), self.limit)
        start = more.pop('start_s', None) or self.uniform(10, 14)
        goal = more.pop('goal_s', route.length - GOAL_BEFORE_END_M)
        values = {
            'start_speed': self.uniform(0, 7),
            'time_limit': 45 + 3 * (goal - start) / self.limit,
            **more,
        }
        return Episode(town=town, route=route, start_s=start, goal_s=goal, **values)

    # ---- who is on them ----

    def name(self, prefix: str) -> str:
        """Return a new id."""
        self.count += 1
        return f'{prefix}{self.count}'

    def car(self, path: Path, s: float, v: float, kind: str = '', **more) -> Mover:
        """Make a car, van or truck on a path."""
        kind = kind or self.pick('car', 'car', 'car', 'van', 'truck')
        more.setdefault('cruise', v)
        return Mover(
            id=self.name('car'),
            kind='vehicle',
            type_id='vehicle.truck' if kind == 'truck' else 'vehicle.car',
            size={'car': CAR, 'van': VAN, 'truck': TRUCK}[kind],
            path=path,
            s=s,
            v=v,
            **more,
        )

    def parked(self, path: Path, s: float, d: float, kind: str = '') -> Body:
        """Make a car that stands there for good."""
        x, y, yaw = path.pose(s, d)
        size = {'car': CAR, 'van': VAN, 'truck': TRUCK}[kind or self.pick('car', 'car', 'van')]
        return Body(
            self.name('parked'),
            'vehicle',
            'vehicle.parked',
            size,
            x,
            y,
            yaw + self.uniform(-0.03, 0.03),
        )

    def parked_row(self, episode: Episode, s: float, stop: float, step: int = 1) -> None:
        """Fill the bays beside the kerb side of the lane from s on, forwards or backwards; the first is taken."""
        route, first = episode.route, True
        d = -float(route.right[0]) - BAY_WIDTH / 2 + 0.1
        while s * step < stop * step:
            if first or self.chance(0.75):
                across = d + self.uniform(-0.1, 0.1)
                episode.statics.append(
                    self.parked(route, s, across, self.pick('car', 'car', 'van'))
                )
            first = False
            s += step * self.uniform(6.3, 7.5)

    def parking(self, episode: Episode, begin: float, stop: float) -> None:
        """Lay a parking strip along the route's road."""
        edge = -float(episode.route.right[0])
        episode.town.add_parking(episode.route, begin, stop, edge, edge - BAY_WIDTH)

    def thing(self, type_id: str, path: Path, s: float, d: float, turn: float = 0.0) -> Body:
        """Make a cone or a barrier; a barrier is 2 m across the path at turn 0."""
        x, y, yaw = path.pose(s, d)
        size = {'static.cone': (0.35, 0.35, 0.75), 'static.barrier': (0.4, 2.0, 1.0)}[type_id]
        return Body(self.name(type_id.split('.')[1]), 'static', type_id, size, x, y, yaw + turn)

    def arrivals(
        self, path: Path, entry: float, first_time: float, count: int, headway: tuple[float, float]
    ) -> list[Mover]:
        """Make cars that come to s = entry from `first_time` on; those that would start off the path are left out."""
        cars, time, speed = [], first_time, self.uniform(6.5, 8.0)
        for _ in range(count):
            s = entry - speed * time
            if s > 2 and s < entry - 6:
                cars.append(self.car(path, s, speed))
            time += self.uniform(*headway)
        return cars

    def walkers(self, episode: Episode, first: float, share: float = 0.5) -> None:
        """Let people stand and walk on the pavements of the first straight, each on their own line; they stay there."""
        if not self.chance(share):
            return
        route = episode.route
        for line in range(int(self.random.integers(1, 4))):
            # Beside parking places the pavement is further out, so there they keep to the other side.
            on_right = self.chance(0.6) and not episode.town.parking
            away = 0.6 + 0.6 * line
            d = -(route.right[0] + away) if on_right else route.left[0] + away
            way = Path(np.array([route.pose(s, d)[:2] for s in (5.0, first - 12.0)]))
            if self.chance(0.5):
                way = Path(way.xy[::-1])
            speed = self.pick(0.0, self.uniform(0.6, 1.2))
            room = way.length - speed * 45
            if room <= 0:
                speed, room = 0.0, way.length
            episode.movers.append(self.walker(way, self.uniform(0, room), speed))

    def walker(self, path: Path, s: float, speed: float, **more) -> Mover:
        """Make a pedestrian."""
        more.setdefault('cruise', speed)
        return Mover(
            id=self.name('walker'),
            kind='walker',
            type_id='walker.pedestrian',
            size=WALKER,
            path=path,
            s=s,
            v=speed,
            keeps_distance=False,
            **more,
        )


def change_lane(episode: Episode, command: Command, due: float) -> None:
    """Ask for a lane change from the start up to s = due; the command rests once the ego is in the lane."""
    episode.lane_change_by = due
    episode.route.set_command(0, due, command)

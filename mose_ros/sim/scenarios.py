"""The scenario families: from a seed to an episode, that is roads, the ego's route, traffic, and what will happen.

Each family draws everything from one generator. What comes suddenly comes so that a driver who reacts within half a
second and brakes with 6 m/s^2 can still stop.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mose_ros.core.types import Command
from mose_ros.sim.physics import Physics
from mose_ros.sim.town import LEFT, RIGHT, STRAIGHT, Block, Path, Route, Town
from mose_ros.sim.traffic import CAR, TRUCK, VAN, Body, Light, Mover

GOAL_BEFORE_END_M = 12.0


@dataclass
class Episode:
    """All that a family decides."""

    town: Town
    route: Route
    start_s: float
    goal_s: float
    start_d: float = 0.0
    start_yaw: float = 0.0  # relative to the route
    start_speed: float = 0.0
    movers: list[Mover] = field(default_factory=list)
    statics: list[Body] = field(default_factory=list)
    lights: list[Light] = field(default_factory=list)
    siren: Mover | None = None
    may_use_opposing: bool = False
    lane_change: Command | None = None  # due until the ego is in the route's lane
    time_limit: float = 120.0


class Maker:
    """What the families share: the generator, the roads and the habit of giving everything a name."""

    def __init__(self, physics: Physics, seed: int, index: int):
        self.random = np.random.default_rng([seed, index])
        self.physics = physics
        self.seed = seed
        self.count = 0
        self.limit = float(self.random.uniform(8.0, 9.0))

    def uniform(self, low: float, high: float) -> float:
        """Draw a number."""
        return float(self.random.uniform(low, high))

    def chance(self, share: float) -> bool:
        """Draw yes or no."""
        return bool(self.random.uniform() < share)

    def pick(self, *choices):
        """Draw one of these."""
        return choices[int(self.random.integers(len(choices)))]

    def town(self, blocks: list[Block], lanes: int, first: float | None = None) -> Town:
        """Lay the roads."""
        return self.physics.make_town(
            blocks,
            lanes=lanes,
            width=self.uniform(3.35, 3.75),
            first=first or self.uniform(50, 80),
            heading=self.uniform(-np.pi, np.pi),
            seed=self.seed,
        )

    def episode(self, town: Town, end: str, lane: int, **more) -> Episode:
        """Make the episode of a route from the first road to a node."""
        route = Route(town, town.way('>', end, lane), self.limit)
        start = self.uniform(10, 14)
        goal = route.length - GOAL_BEFORE_END_M
        values = {
            'start_s': start,
            'goal_s': goal,
            'start_speed': self.uniform(0, 7),
            'time_limit': 40 + 3 * (goal - start) / self.limit,
            **more,
        }
        return Episode(town=town, route=route, **values)

    def name(self, prefix: str) -> str:
        """Return a new id."""
        self.count += 1
        return f'{prefix}{self.count}'

    def car(self, path: Path, s: float, v: float, **more) -> Mover:
        """Make a car, van or truck on a path."""
        kind = more.pop('kind', None) or self.pick('car', 'car', 'car', 'van', 'truck')
        size = {'car': CAR, 'van': VAN, 'truck': TRUCK}[kind]
        type_id = 'vehicle.truck' if kind == 'truck' else 'vehicle.car'
        more.setdefault('cruise', v)
        return Mover(
            id=self.name('car'),
            kind='vehicle',
            type_id=type_id,
            size=size,
            path=path,
            s=s,
            v=v,
            **more,
        )

    def stream(
        self, path: Path, start: float, end: float, gap: tuple[float, float], speed: float
    ) -> list[Mover]:
        """Fill a path from start to end with cars at one speed; gaps are from centre to centre."""
        cars, s = [], start + self.uniform(0, gap[1] - gap[0])
        while s < end:
            cars.append(self.car(path, s, speed))
            s += self.uniform(*gap) + 4
        return cars


def normal(make: Maker) -> Episode:
    """Lane following, curves, turns by command, roundabouts; light traffic that is in nobody's way."""
    layout = make.pick('curves', 'crossing', 'crossing', 'tee', 'roundabout')
    return {'curves': _curves, 'crossing': _crossing, 'tee': _crossing, 'roundabout': _roundabout}[
        layout
    ](make, layout)


def _curve(make: Maker, angle: tuple[float, float], length: tuple[float, float]) -> Block:
    return Block(
        letter='C',
        config={
            'length': make.uniform(*length),
            'radius': make.uniform(22, 50),
            'angle': make.uniform(*angle),
            'dir': make.pick(0, 1),
        },
    )


def _curves(make: Maker, _: str) -> Episode:
    lanes = make.pick(1, 2, 3)
    blocks = [_curve(make, (30, 80), (5, 20))]
    if make.chance(0.6):
        blocks.append(_curve(make, (25, 60), (20, 30)))
    else:
        blocks.append(Block(letter='S', config={'length': make.uniform(30, 60)}))
    town = make.town(blocks, lanes)
    last = len(blocks)
    end = f'{last}{blocks[-1].letter}0_{1 if blocks[-1].letter == "C" else 0}_'
    lane = make.pick(*range(lanes))
    episode = make.episode(town, end, lane)
    _add_light_traffic(make, episode, end, lanes, lane, oncoming=True)
    return episode


def _crossing(make: Maker, layout: str) -> Episode:
    lanes = make.pick(1, 2, 2, 3) if layout == 'crossing' else make.pick(1, 2)
    missing = make.pick(RIGHT, STRAIGHT, LEFT) if layout == 'tee' else None
    turn = make.pick(*[t for t in (RIGHT, STRAIGHT, LEFT) if t != missing])
    letter = 'X' if layout == 'crossing' else 'T'
    blocks = [Block(letter=letter, config={} if missing is None else {'t_type': missing})]
    blocks += [
        Block(letter='S', parent=1, socket=socket, config={'length': make.uniform(25, 60)})
        for socket in (RIGHT, STRAIGHT, LEFT)
        if socket != missing
    ]
    town = make.town(blocks, lanes, first=make.uniform(55, 90))
    arms = {block.socket: index for index, block in enumerate(blocks, 1) if index > 1}
    lane = {RIGHT: lanes - 1, LEFT: 0}.get(turn, make.pick(*range(lanes)))
    end = f'{arms[turn]}S0_0_'
    episode = make.episode(town, end, lane)
    _add_light_traffic(make, episode, end, lanes, lane, oncoming=turn == STRAIGHT)
    for socket in arms:
        if make.chance(0.5) and not (turn == STRAIGHT and socket == STRAIGHT):
            node = f'-1{letter}{socket}'
            path = town.path(f'{node}_1_', f'{node}_0_')
            episode.movers.append(make.car(path, path.length - make.uniform(4.5, 6), 0.0))
    return episode


def _roundabout(make: Maker, _: str) -> Episode:
    lanes = make.pick(1, 1, 2)
    turn = make.pick(RIGHT, STRAIGHT, LEFT)
    ring = {'exit_radius': make.uniform(9, 13), 'inner_radius': make.uniform(15, 22)}
    blocks = [
        Block(letter='O', config=ring),
        Block(letter='S', socket=turn, config={'length': make.uniform(15, 30)}),
    ]
    town = make.town(blocks, lanes, first=make.uniform(45, 60))
    lane = {RIGHT: lanes - 1}.get(turn, make.pick(*range(lanes)))
    episode = make.episode(town, '2S0_0_', lane)
    _add_light_traffic(make, episode, '2S0_0_', lanes, lane, oncoming=False)
    return episode


def _add_light_traffic(
    make: Maker, episode: Episode, end: str, lanes: int, lane: int, *, oncoming: bool
) -> None:
    """Put a car or two ahead, some in the lanes beside that run along with the route, some coming towards."""
    town, route = episode.town, episode.route
    if make.chance(0.6):
        s = episode.start_s + make.uniform(18, 45)
        speed = make.limit * make.uniform(0.7, 1.0)
        episode.movers.append(
            make.car(route, s, max(3.0, min(speed, episode.start_speed + 2)), cruise=speed)
        )
    for other in range(lanes):
        if other != lane and make.chance(0.5) and not route.junctions:
            s = episode.start_s + make.uniform(-8, 50)
            path = town.path('>', end, other)
            episode.movers.append(make.car(path, max(s, 3), make.limit * make.uniform(0.6, 0.95)))
    if oncoming:
        path = town.path(f'-{end}', '->', make.pick(*range(lanes)))
        for s in np.arange(make.uniform(0, 30), path.length - 40, 22):
            if make.chance(0.35):
                episode.movers.append(
                    make.car(path, float(s), make.limit * make.uniform(0.75, 0.95))
                )


MAKERS: dict[str, Callable[[Maker], Episode]] = {'normal': normal}

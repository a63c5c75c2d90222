"""Roads of one episode: MetaDrive's blocks turned into polylines, paths along them, and the ground to draw.

MetaDrive lays the blocks (straight, curve, crossing, T, roundabout) and the Bullet physics of the ego vehicle; this module
asks it once per episode for the lanes and keeps plain arrays from there on, turned by the episode's own heading.
Lane 0 of a road is its leftmost; a road's other direction is MetaDrive's road with the node names negated.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float

from mose_ros.core.types import Actor, Command, Corridor
from mose_ros.sim.roads import Paint, RoadMap, Surface

RIGHT, STRAIGHT, LEFT = 0, 1, 2  # MetaDrive's sockets of a crossing, T or roundabout
STEP = 1.0  # m between the points of every path
COMMAND_AHEAD = 30.0  # m before a junction from which its command is given
WALK_WIDTH = 2.2  # m of a sidewalk


@dataclass(frozen=True, kw_only=True)
class Block:
    """One MetaDrive block hung on a socket of an earlier one; block 0 is the straight road that comes first."""

    letter: str  # S, C, X, T or O
    parent: int = -1  # -1: the block before this one in the list
    socket: int = 0  # of the parent; RIGHT, STRAIGHT or LEFT of a junction
    config: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Road:
    """All lanes of one direction between two nodes."""

    start: str
    end: str
    center: Sequence[Float[np.ndarray, 'N 2']]  # of each lane
    left: Sequence[Float[np.ndarray, 'N 2']]  # left edge of each lane
    right: Sequence[Float[np.ndarray, 'N 2']]
    width: float  # of a lane
    lines: Sequence[
        tuple[str, str]
    ]  # left and right line of each lane: '', 'broken', 'solid', 'edge'
    yellow: Sequence[bool]  # whether the left line of each lane is yellow


class Path:
    """A polyline of points STEP apart: position s is metres along it, d metres to its left."""

    def __init__(self, points: Float[np.ndarray, 'N 2']):
        steps = np.hypot(*np.diff(points, axis=0).T)
        keep = np.concatenate([[True], steps > 1e-6])
        points = points[keep]
        along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
        self.length = float(along[-1])
        count = max(2, int(round(self.length / STEP)) + 1)
        stations = np.linspace(0, self.length, count)
        self.step = float(stations[1])
        self.xy = np.stack([np.interp(stations, along, points[:, k]) for k in (0, 1)], 1)
        difference = np.gradient(self.xy, axis=0)
        self.yaw = np.unwrap(np.arctan2(difference[:, 1], difference[:, 0]))

    def pose(self, s: float, d: float = 0.0) -> tuple[float, float, float]:
        """Return x, y and yaw at s; before the start and beyond the end it goes straight on."""
        position = s / self.step
        index = min(max(int(position), 0), len(self.xy) - 2)
        share = position - index
        (x0, y0), (x1, y1) = self.xy[index], self.xy[index + 1]
        inside = min(max(share, 0.0), 1.0)
        yaw = float(self.yaw[index] + inside * (self.yaw[index + 1] - self.yaw[index]))
        x = x0 + share * (x1 - x0) - d * np.sin(yaw)
        y = y0 + share * (y1 - y0) + d * np.cos(yaw)
        return float(x), float(y), yaw

    def project(self, x: float, y: float, near: float | None = None) -> tuple[float, float]:
        """Return s and d of a point; with `near`, only within 25 m of that s, which tells apart ways that cross."""
        low, high = 0, len(self.xy)
        if near is not None:
            low = min(max(0, int((near - 25) / self.step)), high - 2)
            high = max(min(high, int((near + 25) / self.step) + 2), low + 2)
        piece = self.xy[low:high]
        offset = piece - (x, y)
        index = low + int(np.argmin(offset[:, 0] ** 2 + offset[:, 1] ** 2))
        index = min(index, len(self.xy) - 2)
        best = None
        for i in (max(index - 1, 0), index):
            ax, ay = self.xy[i]
            ux, uy = (self.xy[i + 1] - self.xy[i]) / self.step
            along = (x - ax) * ux + (y - ay) * uy
            side = (y - ay) * ux - (x - ax) * uy
            beyond = max(
                -along if i > 0 else 0.0, along - self.step if i < len(self.xy) - 2 else 0
            )
            if best is None or (max(beyond, 0.0), abs(side)) < best[0]:
                best = ((max(beyond, 0.0), abs(side)), i * self.step + along, side)
        return float(best[1]), float(best[2])


class Route(Path):
    """A path with what surrounds it: the whole corridor of an episode, from which each moment takes its slice."""

    def __init__(self, town: 'Town', lanes: Sequence[tuple[str, str, int]], speed_limit: float):
        pieces = [town.roads[a, b].center[i] for a, b, i in lanes]
        super().__init__(np.concatenate(pieces))
        ends = np.cumsum([np.hypot(*np.diff(p, axis=0).T).sum() for p in pieces])
        owner = np.searchsorted(ends, np.arange(len(self.xy)) * self.step - 1e-6)
        owner = np.minimum(owner, len(lanes) - 1)
        self.lanes, self.ends, self.speed_limit = lanes, ends, speed_limit
        rooms = np.array([town.room(*lane) for lane in lanes])
        self.left, self.right, self.own_left, self.width = rooms[owner].T.copy()
        self.junction = np.array([town.is_junction(a, b) for a, b, _ in lanes])[owner]
        self.limit = np.full(len(self.xy), speed_limit)
        self.commands = [Command.FOLLOW] * len(self.xy)
        self.junctions = self._find_junctions()
        for start, end, command in self.junctions:
            self.set_command(start - COMMAND_AHEAD, end, command)

    def _find_junctions(self) -> list[tuple[float, float, Command]]:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], self.junction.astype(int), [0]])))
        found = []
        for first, beyond in zip(edges[::2], edges[1::2], strict=True):
            last = min(beyond, len(self.yaw) - 1)
            turn = self.yaw[last] - self.yaw[max(first - 1, 0)]
            command = Command.STRAIGHT
            if abs(turn) > 0.5:
                command = Command.LEFT if turn > 0 else Command.RIGHT
            found.append((first * self.step, beyond * self.step, command))
        return found

    def span(self, start: float, end: float) -> slice:
        """Return the indices of the points from s = start to s = end."""
        return slice(max(0, int(np.ceil(start / self.step))), max(0, int(end / self.step) + 1))

    def set_command(self, start: float, end: float, command: Command) -> None:
        """Give a command on a stretch."""
        for index in range(*self.span(start, end).indices(len(self.xy))):
            self.commands[index] = command

    def corridor(
        self, s: float, without: frozenset[Command] = frozenset()
    ) -> tuple[Corridor, float]:
        """Return the slice around s, with the commands of `without` read as FOLLOW, and where s is in it."""
        first = max(0, int((s - 10) / self.step))
        part = slice(first, max(first + 2, int((s + 90) / self.step) + 1))
        commands = [Command.FOLLOW if c in without else c for c in self.commands[part]]
        corridor = Corridor(
            xy=self.xy[part],
            left=self.left[part],
            right=self.right[part],
            own_left=self.own_left[part],
            lane_width=self.width[part],
            junction=self.junction[part],
            speed_limit=self.limit[part],
            commands=tuple(commands),
        )
        return corridor, s - first * self.step


class Town:
    """The road network of one episode."""

    def __init__(self, roads: dict[tuple[str, str], Road], seed: int):
        self.roads = roads
        self.seed = seed
        self.parking: list[tuple[Path, float, float, float, float]] = []  # path, s0, s1, d0, d1
        self.extra_paint: list[Paint] = []
        self.broken_center: set[tuple[str, str]] = set()  # roads whose centre line may be crossed
        self.graph: dict[str, list[str]] = {}
        for a, b in roads:
            self.graph.setdefault(a, []).append(b)
        ways_in = Counter(b for _, b in roads)
        self.inside = {
            (a, b)
            for a, b in roads
            if len(self.graph[a]) > 1 or ways_in[b] > 1 or self.reverse(a, b) not in roads
        }

    def reverse(self, start: str, end: str) -> tuple[str, str]:
        """Return the key of the other direction, whether there is such a road or not."""
        flip = lambda node: node[1:] if node.startswith('-') else '-' + node  # noqa: E731
        return flip(end), flip(start)

    def is_junction(self, start: str, end: str) -> bool:
        """Say whether this is a way inside a crossing, T or roundabout: ways part or meet there."""
        return (start, end) in self.inside

    def room(self, start: str, end: str, lane: int) -> tuple[float, float, float, float]:
        """Return left, right, own_left and lane width at the centre of a lane, as Corridor has them."""
        road = self.roads[start, end]
        width, count = road.width, len(road.center)
        own_left, right = (lane + 0.5) * width, (count - lane - 0.5) * width
        other = None if (start, end) in self.inside else self.roads[self.reverse(start, end)]
        left = own_left + (len(other.center) * other.width if other else 1.0)
        return left, right, own_left, width

    def nodes(self, start: str, end: str) -> list[str]:
        """Return the shortest way from node to node; ValueError where there is none."""
        queue, seen = [[start]], {start}
        while queue:
            way = queue.pop(0)
            if way[-1] == end:
                return way
            for node in self.graph.get(way[-1], []):
                if node not in seen:
                    seen.add(node)
                    queue.append([*way, node])
        raise ValueError(f'no way from {start} to {end} in {list(self.roads)}')

    def way(self, start: str, end: str, lane: int = -1) -> list[tuple[str, str, int]]:
        """Return the lanes of the shortest way from node to node, in lane `lane` (counted as in a list)."""
        nodes = self.nodes(start, end)
        roads = list(zip(nodes[:-1], nodes[1:], strict=True))
        return [(a, b, range(len(self.roads[a, b].center))[lane]) for a, b in roads]

    def path(self, start: str, end: str, lane: int = -1) -> Path:
        """Return the centre of that way as a path, for the traffic."""
        return Path(
            np.concatenate([self.roads[a, b].center[i] for a, b, i in self.way(start, end, lane)])
        )

    # ---- the ground, to be drawn ----

    def road_map(self) -> RoadMap:
        """Return surfaces, paint and scenery; call it when parking and paint of the scenario are known."""
        surfaces, paint = [], list(self.extra_paint)
        for road in self.roads.values():
            surfaces.append(Surface(left=road.left[0], right=road.right[-1]))
            surfaces += self._sidewalks(road)
            paint += self._lines(road)
        for path, start, end, inner, outer in self.parking:
            stations = np.arange(start, end + 1e-6, 2.0)
            left = np.array([path.pose(s, inner)[:2] for s in stations])
            right = np.array([path.pose(s, outer)[:2] for s in stations])
            surfaces.append(Surface(left=left, right=right, kind='parking'))
        return RoadMap(surfaces=surfaces, paint=paint, scenery=self._scenery(), seed=self.seed)

    def _sidewalks(self, road: Road) -> list[Surface]:
        if road.lines[-1][1] != 'edge':
            return []
        outward = self._outward(road)
        inner = road.right[-1] + outward * self._parking_width(road.right[-1])[:, None]
        return [Surface(left=inner, right=inner + outward * WALK_WIDTH, kind='sidewalk')]

    def _parking_width(self, edge: Float[np.ndarray, 'N 2']) -> Float[np.ndarray, 'N']:
        """Return how wide the parking strips are at each point of a road's edge."""
        width = np.zeros(len(edge))
        for path, start, end, inner, outer in self.parking:
            for index, (x, y) in enumerate(edge):
                s, d = path.project(x, y)
                if start - 0.5 <= s <= end + 0.5 and abs(d - inner) < 0.5:
                    width[index] = inner - outer
        return width

    @staticmethod
    def _outward(road: Road) -> Float[np.ndarray, 'N 2']:
        across = road.right[-1] - road.left[-1]
        return across / np.hypot(*across.T)[:, None]

    def _lines(self, road: Road) -> list[Paint]:
        lines, key = [], (road.start, road.end)
        for lane, (left, right) in enumerate(road.lines):
            # The other direction's lane 0 has the same centre line.
            if left and not (lane == 0 and road.start.startswith('-')):
                broken = left == 'broken' or (lane == 0 and key in self.broken_center)
                color = 'yellow' if road.yellow[lane] else 'white'
                lines.append(Paint(points=road.left[lane], color=color, broken=broken))
            if right and lane == len(road.lines) - 1:
                lines.append(Paint(points=road.right[lane], broken=right == 'broken'))
        return lines

    def _scenery(self) -> list[Actor]:
        """Place houses, trees and lamps along the edges, clear of every road."""
        random = np.random.default_rng([self.seed, 7])
        all_points = np.concatenate([p for road in self.roads.values() for p in road.center])
        placed: list[Actor] = []
        for road in self.roads.values():
            if road.lines[-1][1] != 'edge' or self.is_junction(road.start, road.end):
                continue
            outward = self._outward(road)
            edge = road.right[-1] + outward * self._parking_width(road.right[-1])[:, None]
            steps = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(edge, axis=0).T))])
            s = random.uniform(2, 10)
            while s < steps[-1]:
                k = min(int(np.searchsorted(steps, s)), len(edge) - 1)
                pick = random.uniform()
                if pick < 0.5:
                    size = (random.uniform(8, 18), random.uniform(8, 14), random.uniform(5, 16))
                    gap, kind = 6.5 + random.uniform(0, 5) + size[1] / 2, 'static.building'
                elif pick < 0.8:
                    crown = random.uniform(2, 3.5)
                    size, gap = (crown, crown, random.uniform(4, 7)), WALK_WIDTH + 2.2
                    kind = 'static.tree'
                else:
                    size, gap, kind = (0.25, 0.25, 6.0), WALK_WIDTH + 0.6, 'static.lamp'
                x, y = edge[k] + outward[k] * gap
                yaw = float(np.arctan2(outward[k, 1], outward[k, 0]) + np.pi / 2)
                radius = np.hypot(size[0], size[1]) / 2
                clear = radius + road.width / 2 + (6.0 if kind == 'static.building' else 0.5)
                distance = np.hypot(*(all_points - (x, y)).T).min()
                free = all(
                    np.hypot(o.x - x, o.y - y) > radius + np.hypot(o.size[0], o.size[1]) / 2
                    for o in placed
                )
                if distance > clear and free:
                    name = f'scenery{len(placed)}'
                    size = tuple(float(v) for v in size)
                    placed.append(
                        Actor(
                            id=name,
                            kind='static',
                            type_id=kind,
                            x=float(x),
                            y=float(y),
                            yaw=yaw,
                            size=size,
                        )
                    )
                s += 3 + (size[0] if kind == 'static.building' else 4) * random.uniform(0.6, 1.4)
        return placed

    def add_parking(
        self, path: Path, start: float, end: float, inner: float, outer: float
    ) -> None:
        """Lay a parking strip beside a path, from d = inner to d = outer."""
        self.parking.append((path, start, end, inner, outer))

    def add_stop_line(self, path: Path, s: float, right: float, left: float) -> None:
        """Paint a stop line across a path, from d = right to d = left."""
        points = np.array([path.pose(s, right)[:2], path.pose(s, left)[:2]])
        self.extra_paint.append(Paint(points=points, width=0.4))

    def add_crosswalk(self, path: Path, s: float, right: float, left: float) -> None:
        """Paint the stripes of a crosswalk across a path."""
        for d in np.arange(right + 0.4, left - 0.2, 0.9):
            points = np.array([path.pose(s - 1.5, d)[:2], path.pose(s + 1.5, d)[:2]])
            self.extra_paint.append(Paint(points=points, width=0.45))


def extract_roads(network, heading: float) -> dict[tuple[str, str], Road]:
    """Read all lanes of a MetaDrive road network, turned about the origin by `heading`."""
    from metadrive.constants import PGLineType

    names = {
        PGLineType.BROKEN: 'broken',
        PGLineType.CONTINUOUS: 'solid',
        PGLineType.SIDE: 'edge',
        PGLineType.GUARDRAIL: 'edge',
    }
    turn = np.array([[np.cos(heading), -np.sin(heading)], [np.sin(heading), np.cos(heading)]])

    def sample(lane, lateral, count):
        stations = np.linspace(0, lane.length, count)
        return np.array([lane.position(s, lateral) for s in stations]) @ turn.T

    roads = {}
    for start, ends in network.graph.items():
        for end, lanes in ends.items():
            half = lanes[0].width / 2
            longest = max(lane.length for lane in lanes)
            count = max(2, int(np.ceil(longest / STEP)) + 1)  # the same for all lanes of a road
            roads[start, end] = Road(
                start=start,
                end=end,
                center=[sample(lane, 0.0, count) for lane in lanes],
                left=[sample(lane, -half, count) for lane in lanes],
                right=[sample(lane, half, count) for lane in lanes],
                width=float(lanes[0].width),
                lines=[tuple(names.get(kind, '') for kind in lane.line_types) for lane in lanes],
                yellow=[lane.line_colors[0][2] < 0.5 for lane in lanes],
            )
    return roads


def with_defaults(block: Block) -> Block:
    """Fill in the parameters that MetaDrive would draw at random."""
    defaults = {
        'S': {'length': 60.0},
        'C': {'length': 20.0, 'radius': 35.0, 'angle': 60.0, 'dir': 0},
        'X': {'radius': 10, 'change_lane_num': 0, 'decrease_increase': 0},
        'T': {'radius': 10, 't_type': 0, 'change_lane_num': 0, 'decrease_increase': 0},
        'O': {'exit_radius': 10.0, 'inner_radius': 18.0, 'angle': 60},
    }
    return replace(block, config={**defaults[block.letter], **block.config})

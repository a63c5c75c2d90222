"""What the expert knows of one moment: the ego vehicle on its road, who is there and where they will be, where to stop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mose_ros.core.types import Actor, Command, Scene
from mose_ros.sim.frenet import Frenet, wrap

Forecast = Callable[..., 'dict[str, Float[np.ndarray, "T 2"]]']  # (horizon, dt): seconds

DT, FINE, COARSE = 0.2, 15, 12  # 3 s in steps of 0.2 s, then up to 7.8 s in steps of 0.4 s
TIMES = np.concatenate([DT * np.arange(1, FINE + 1), 3.0 + 0.4 * np.arange(1, COARSE + 1)])
STEPS = np.diff(TIMES, prepend=0.0)
_PICK = np.round(TIMES / DT).astype(int) - 1  # where those times are in a forecast at DT

HARD_BRAKE = 7.5  # m/s^2
LINE_GAP = 1.0  # m between the front and a stop line
STOP_ZONE = 3.0  # m before the line of a stop sign within which a standstill counts
CRAWL = (0.8, 2.6)  # m/s: slower is a stop, faster is a lead that gathers speed again


@dataclass(frozen=True, kw_only=True)
class Others:
    """All actors that can be hit, over the rollout's times, in world and road coordinates. T is 0 (now) and TIMES."""

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
class Wall:
    """A place where the front must stand."""

    distance: float  # m for the centre of the ego vehicle to go
    cause: str
    actor_id: str


class Situation:
    """All that is worked out of a scene before anything is planned."""

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

    def _watch(self, forecast: Forecast | None) -> Others:
        """Return who is near enough to matter, with their future."""
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
        told = forecast(float(TIMES[-1]), DT) if forecast is not None and actors else {}
        count = len(TIMES) + 1
        xy = np.zeros((count, len(actors), 2))
        for index, actor in enumerate(actors):
            xy[0, index] = actor.x, actor.y
            future = told.get(actor.id)
            xy[1:, index] = future[_PICK] if future is not None else self._guess(actor)
        step = np.diff(xy, axis=0)
        moved = np.hypot(step[..., 0], step[..., 1])
        speed = np.concatenate([[[np.hypot(*a.velocity) for a in actors]], moved / STEPS[:, None]])
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
        return Others(
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
            x, y, _ = self.road.world(s + np.sign(turn) * speed * TIMES, np.full(len(TIMES), d))
            return np.stack([x, y], axis=1)
        return here + np.outer(TIMES, actor.velocity)

    def _find_walls(self) -> list[Wall]:
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
                walls.append(Wall(distance=distance, cause=cause, actor_id=actor.id))
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

    def crawls(self, index: int) -> bool:
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

    def edge(self) -> float:
        """Return the offset of who keeps to the right."""
        room = float(self.road.at(self.s + 8.0, self.road.right))
        return -float(np.clip(room - self.half_width - 0.35, 0.0, 1.5))

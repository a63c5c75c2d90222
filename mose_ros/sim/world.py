"""The embedded simulator: a world that is made from a family and a seed, driven step by step, looked at and judged.

MetaDrive lays the roads and moves the ego (Bullet); the traffic is ours and kinematic; the pictures are the renderer's.
"""

import threading

import numpy as np
from jaxtyping import Float, UInt8

from mose_ros.core.types import (
    FAMILIES,
    FAR_M,
    NEAR_M,
    Command,
    EgoState,
    Guidance,
    Observation,
    Scene,
    VehicleCommand,
)
from mose_ros.sim.judge import Judge, Outcome
from mose_ros.sim.physics import Physics
from mose_ros.sim.roads import RoadMap
from mose_ros.sim.scenarios import MAKERS, Episode, Maker
from mose_ros.sim.traffic import DT, Body, Moment

LANE_CHANGE = frozenset({Command.LANE_LEFT, Command.LANE_RIGHT})
EGO_HEIGHT = 1.5


class World:
    """One town and one ego at a time; one World per process, in its main thread.

    `renderer` is a back end of sim.renderer, 'auto' to choose one, or None for a world without pictures.
    """

    scene: Scene
    outcome: Outcome
    roads: RoadMap

    def __init__(
        self, *, renderer: str | None = 'auto', camera_size: tuple[int, int] = (256, 144)
    ):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError('make and step the World in the main thread')
        self._renderer = None
        if renderer is not None:
            from mose_ros.sim.renderer import Renderer

            self._renderer = Renderer(renderer, camera_size)
        self._physics = Physics()
        self._episode: Episode | None = None

    @property
    def route(self) -> Float[np.ndarray, 'N 2']:
        """Return the way of the whole episode, world frame; beyond its end it goes straight on."""
        return self._episode.route.xy

    def reset(self, family: str, seed: int) -> Scene:
        """Make the episode of a family and seed; ValueError for an unknown family or a seed out of range."""
        if family not in FAMILIES:
            raise ValueError(f'unknown family {family!r}; choose one of {", ".join(FAMILIES)}')
        if not (isinstance(seed, int | np.integer) and 0 <= seed < 2**31):
            raise ValueError(f'seed {seed!r} is not an integer in 0..2**31-1')
        self._family = family
        make = Maker(self._physics, int(seed), FAMILIES.index(family))
        self._episode = episode = MAKERS[family](make)
        x, y, yaw = episode.route.pose(episode.start_s, episode.start_d)
        self._physics.place(x, y, yaw, episode.start_speed)
        self._time, self._s = 0.0, episode.start_s
        self._acceleration, self._speed = 0.0, episode.start_speed
        self._since_stop = 0.0 if episode.start_speed < 0.1 else 100.0
        self._still_s, self._changed_lane = 0.0, False
        for light in episode.lights:
            light.set_time(0.0)
        self._judge = Judge(episode)
        self.roads = episode.town.road_map()
        if self._renderer:
            self._renderer.load(self.roads)
        self.outcome = Outcome()
        self._moment = self._look(self._read_ego())
        self.scene = self._make_scene()
        return self.scene

    def step(self, command: VehicleCommand) -> Scene:
        """Drive 0.1 s; ValueError for a command that is not finite."""
        values = np.array([command.steer, command.throttle, command.brake], float)
        if not np.isfinite(values).all():
            raise ValueError(f'the command {command} is not finite')
        if self._episode is None:
            raise RuntimeError('reset the world before the first step')
        steer, throttle, brake = np.clip(values, [-1, 0, 0], 1)
        self._physics.step(float(steer), float(throttle), float(brake))
        self._time += DT
        ego = self._read_ego()
        self._moment = self._look(ego)
        self._move_traffic()
        self.outcome = self._judge.judge(self._moment, self._bodies())
        self.scene = self._make_scene()
        return self.scene

    def images(self) -> dict[str, UInt8[np.ndarray, 'H W 3']]:
        """Render the cameras now."""
        return self._drawer().render(self.scene.ego, self.scene.actors)

    def semantics(self, *args, **kwargs):
        """Render the cameras' classes now; arguments are the renderer's."""
        return self._drawer().semantics(self.scene.ego, self.scene.actors, *args, **kwargs)

    def overview(self, *args, **kwargs):
        """Render the view from above; arguments are the renderer's."""
        return self._drawer().overview(self.scene.ego, self.scene.actors, *args, **kwargs)

    def observation(self) -> Observation:
        """Return what a policy may see now."""
        return Observation(
            time=self.scene.time,
            images=self.images(),
            ego=self.scene.ego,
            guidance=self.scene.guidance,
        )

    def forecast(
        self, horizon: float = 5.0, dt: float = 0.2
    ) -> dict[str, Float[np.ndarray, 'T 2']]:
        """Return where each vehicle and walker will be, row i at (i + 1) * dt, as far as it doesn't depend on the ego."""
        count = int(round(horizon / dt))
        rows = {mover.id: mover.forecast(count, dt) for mover in self._episode.movers}
        for body in self._episode.statics:
            rows[body.id] = np.tile([body.x, body.y], (count, 1)).astype(float)
        return rows

    @property
    def route_length(self) -> float:
        """Return the metres from start to goal."""
        return self._episode.goal_s - self._episode.start_s

    def close(self) -> None:
        """End engine and renderer; a new World can be made after that."""
        if self._renderer is not None:
            self._renderer.close()
        self._physics.close()

    def _drawer(self):
        if self._renderer is None:
            raise RuntimeError('this World was made with renderer=None and has no pictures')
        return self._renderer

    def _read_ego(self) -> EgoState:
        x, y, yaw, speed, rate = self._physics.state()
        if self._time > 0:
            self._acceleration += 0.5 * ((speed - self._speed) / DT - self._acceleration)
            self._since_stop += abs(speed) * DT
        self._speed = speed
        self._still_s = self._still_s + DT if abs(speed) < 0.1 else 0.0
        if self._still_s > 0.29:
            self._since_stop = 0.0
        length, width = self._physics.size()
        return EgoState(
            x=x,
            y=y,
            yaw=yaw,
            speed=speed,
            acceleration=self._acceleration,
            yaw_rate=rate,
            since_stop=self._since_stop,
            size=(length, width, EGO_HEIGHT),
        )

    def _look(self, ego: EgoState) -> Moment:
        self._s, d = self._episode.route.project(ego.x, ego.y, self._s)
        if self._episode.lane_change_by and abs(d) < 0.35 * self._episode.route.width[0]:
            self._changed_lane = True
        return Moment(time=self._time, ego=ego, ego_s=self._s, ego_d=d)

    def _bodies(self) -> list[Body]:
        return [*self._episode.movers, *self._episode.statics]

    def _move_traffic(self) -> None:
        ego, episode = self._moment.ego, self._episode
        velocity = (ego.speed * np.cos(ego.yaw), ego.speed * np.sin(ego.yaw))
        me = Body('ego', 'vehicle', 'vehicle.ego', ego.size, ego.x, ego.y, ego.yaw, velocity)
        for light in episode.lights:
            light.set_time(self._time)
        others = [*self._bodies(), me]
        for mover in episode.movers:
            mover.tick(self._moment, others)
        episode.movers = [mover for mover in episode.movers if not mover.gone]

    def _make_scene(self) -> Scene:
        moment, episode = self._moment, self._episode
        done = LANE_CHANGE if self._changed_lane else frozenset()
        corridor, progress = episode.route.corridor(moment.ego_s, done)
        index = min(
            max(int(moment.ego_s / episode.route.step), 0), len(episode.route.commands) - 1
        )
        command = episode.route.commands[index]
        actors = [body.actor() for body in self._bodies()]
        actors += [light.seen_from(moment) for light in episode.lights]
        return Scene(
            time=self._time,
            ego=moment.ego,
            actors=tuple(actors),
            corridor=corridor,
            progress=progress,
            guidance=Guidance(
                near=self._ahead(NEAR_M),
                far=self._ahead(FAR_M),
                command=Command.FOLLOW if command in done else command,
            ),
            route_completion=self.outcome.route_completion,
            family=self._family,
        )

    def _ahead(self, distance: float) -> Float[np.ndarray, '2']:
        ego = self._moment.ego
        x, y, _ = self._episode.route.pose(self._moment.ego_s + distance)
        c, s = np.cos(ego.yaw), np.sin(ego.yaw)
        dx, dy = x - ego.x, y - ego.y
        return np.array([c * dx + s * dy, -s * dx + c * dy])

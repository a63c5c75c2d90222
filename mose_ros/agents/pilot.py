"""Drive in lock-step by what CARLA's sensors say: the in-process agent without the Leaderboard around it.

Tick by tick: place the vehicle, look and plan at every second tick (10 Hz of 20), and let the controller answer, which believes
and brakes as that of the ROS graph does. Knows neither the carla module nor a server, so the same ticks give the same commands anywhere.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from mose_ros.agents import settings
from mose_ros.core import carla
from mose_ros.core.controller import Caution, Controller
from mose_ros.core.navigation import EgoHistory, RouteFollower, smooth
from mose_ros.core.rig import CAMERAS
from mose_ros.core.types import EgoState, Observation, Plan, Policy, VehicleCommand

TICK_S = 0.05  # the Leaderboard and Bench2Drive tick at 20 Hz
ROUTES = ('sparse', 'dense')
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What an agent's YAML file may say."""

    bundle: str = '../../models/mose-tiny'  # folder of the exported network, seen from the file
    backend: str = 'auto'  # as `python -m mose_ros.engine` knows them
    threads: int = 2  # of one inference
    mode: str = 'learned'  # how candidate views are chosen: learned, fixed, all
    image_width: int = 1600  # px, Bench2Drive's
    image_height: int = 900
    jpeg_quality: int = 0  # pictures pass through JPEG of this quality; Bench2Drive's clips have 20; 0: as they come
    route: str = 'sparse'  # what the Leaderboard hands out, or 'dense': the plan behind it, which no ranking allows
    warm_up_ticks: int = 11  # the brake is held so long while memory fills
    plan_every: int = 2  # ticks
    plan_max_age_s: float = 0.35  # an older plan is not followed

    def __post_init__(self):
        positive = (self.threads, self.image_width, self.image_height, self.plan_every)
        is_aged = 0 < self.plan_max_age_s < np.inf
        if min(positive) < 1 or self.warm_up_ticks < 0 or not is_aged:
            raise ValueError(f'{self}: counts and sizes must be positive')
        if not 0 <= self.jpeg_quality <= 100:
            raise ValueError(f'jpeg_quality {self.jpeg_quality} is not in 0..100')
        if self.route not in ROUTES:
            raise ValueError(f'route {self.route!r}; choose one of {", ".join(ROUTES)}')

    @classmethod
    def load(cls, path: str | Path) -> 'AgentConfig':
        """Read a YAML file; ValueError names the file and what is wrong in it. The bundle's path is made absolute."""
        return settings.load(cls, path, paths=('bundle',))


@dataclass(frozen=True, kw_only=True)
class Senses:
    """What the sensors said at one tick, in CARLA's numbers; what is missing is None or absent."""

    cameras: Mapping[str, UInt8[np.ndarray, 'H W 4']]  # by our camera's name, BGRA
    fix: Sequence[float] | None  # latitude and longitude, degrees
    imu: Sequence[float] | None  # accelerometer (3), gyroscope (3), compass
    speed: float | None  # m/s

    @classmethod
    def read(cls, input_data: Mapping[str, tuple[int, Any]]) -> 'Senses':
        """Take apart what the Leaderboard gives to run_step: id -> (frame, data); ValueError for fixes and IMUs that are none."""
        data = {name: value for name, (_, value) in input_data.items()}
        cameras = {name: data.get(carla.sensor_id(name)) for name in CAMERAS}
        speedometer = data.get('speedometer')
        for name, count in {'gnss': 2, 'imu': 7}.items():
            if data.get(name) is not None and len(data[name]) < count:
                raise ValueError(f'{name} has {len(data[name])} values, not {count}')
        return cls(
            cameras={name: picture for name, picture in cameras.items() if picture is not None},
            fix=data.get('gnss'),
            imu=data.get('imu'),
            speed=None if speedometer is None else float(speedometer['speed']),
        )


def follow_plan(
    gps: Sequence[tuple[Mapping[str, float], Any]], world: Sequence[tuple[Any, Any]]
) -> tuple[carla.GeoFrame, RouteFollower]:
    """Return the map's frame and the route of a global plan: pairs of fix or transform and RoadOption.

    The Leaderboard's plan has gaps of up to 200 m (Bench2Drive: 50); between its points the route follows their headings.
    """
    if len(gps) != len(world) or len(world) < 2:
        raise ValueError(
            f'a global plan of {len(gps)} fixes and {len(world)} places leads nowhere'
        )
    poses = np.array([carla.pose(t.location.x, t.location.y, t.rotation.yaw) for t, _ in world])
    degrees = np.array([(fix['lat'], fix['lon']) for fix, _ in gps], float)
    frame = carla.GeoFrame.fit(degrees, poses[:, :2])
    points, owner = smooth(poses[:, :2], poses[:, 2])
    commands = [carla.command(option) for _, option in world]
    return frame, RouteFollower(points, commands=[commands[index] for index in owner])


class Pilot:
    """Answers every tick of one route."""

    def __init__(
        self, policy: Policy, config: AgentConfig, frame: carla.GeoFrame, route: RouteFollower
    ):
        self._policy, self._config, self._frame, self._route = policy, config, frame, route
        self._localizer, self._history = carla.Localizer(), EgoHistory()
        caution = Caution(plan_max_age_s=config.plan_max_age_s)
        self._controller = Controller(carla.LINCOLN, TICK_S, caution)
        self._tick, self._said = 0, ''
        self.plan: Plan | None = None  # the newest
        self.failures = 0  # ticks at which there should have been a plan and was none
        policy.reset()

    def tick(self, time: float, senses: Senses) -> VehicleCommand:
        """Answer one tick; where there is no plan, whatever the reason, it is logged and the answer is to brake.

        Raises what malformed fixes, IMUs or times deserve, before anything is changed by them.
        """
        if not np.isfinite(time):
            raise ValueError(f'a tick at {time} s')
        ego = self._place(time, senses)
        if self._tick % self._config.plan_every == 0:
            try:
                self._look_and_plan(time, ego, senses)
            except Exception as error:  # the evaluation waits for an answer whatever has happened
                self.failures += 1
                _log.error('tick %d: no plan: %s: %s', self._tick, type(error).__name__, error)
        self._tick += 1
        if self._tick <= self._config.warm_up_ticks:
            return VehicleCommand(steer=0.0, throttle=0.0, brake=carla.LINCOLN.hold_brake)
        command = self._controller.command(time)
        self._tell()
        return command

    def _place(self, time: float, senses: Senses) -> EgoState:
        fix = None
        if senses.fix is not None:
            try:
                fix = self._frame.point(*map(float, senses.fix[:2]))
            except ValueError as error:  # as good as not measured
                _log.warning('tick %d: %s', self._tick, error)
        imu = np.full(7, np.nan) if senses.imu is None else np.asarray(senses.imu, float)
        state = self._localizer.update(
            time,
            fix=fix,
            yaw=carla.compass_yaw(imu[6]) if np.isfinite(imu[6]) else None,
            yaw_rate=-float(imu[5]),  # CARLA's gyroscope turns clockwise
            speed=senses.speed,
            acceleration=float(imu[0]),
        )
        ego = self._history.add(time, state)
        if self._localizer.is_placed:
            try:
                self._controller.hear_odometry(time, ego, 0.0, time)
            except ValueError as error:
                _log.warning('tick %d: %s', self._tick, error)
        return ego

    def _look_and_plan(self, time: float, ego: EgoState, senses: Senses) -> None:
        if not self._localizer.is_placed:
            raise ValueError('no fix yet')
        images = {name: self._picture(data) for name, data in senses.cameras.items()}
        guidance = self._route.guidance(ego)
        seen = Observation(time=time, images=images, ego=ego, guidance=guidance)
        self.plan = self._policy.plan(seen, None)
        self._controller.hear_plan(self.plan.trajectory, time - self.plan.trajectory.time, time)

    def _picture(self, bgra: UInt8[np.ndarray, 'H W 4']) -> UInt8[np.ndarray, 'H W 3']:
        picture = cv2.cvtColor(np.ascontiguousarray(bgra), cv2.COLOR_BGRA2BGR)
        if self._config.jpeg_quality:
            quality = [cv2.IMWRITE_JPEG_QUALITY, self._config.jpeg_quality]
            picture = cv2.imdecode(cv2.imencode('.jpg', picture, quality)[1], cv2.IMREAD_COLOR)
        return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)

    def _tell(self) -> None:
        """Log the controller's state each time that it changes."""
        state = self._controller.state.value
        if state != self._said:
            _log.info('tick %d: %s: %s', self._tick, state, self._controller.reason)
        self._said = state


def emergency() -> VehicleCommand:
    """Return the answer when nothing else can be said."""
    return VehicleCommand(steer=0.0, throttle=0.0, brake=1.0)

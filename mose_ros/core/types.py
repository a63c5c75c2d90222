"""The vocabulary of mose_ros: every room speaks in these types.

Conventions, stated here once. SI units and radians. Frames are REP-103: x forward, y left, z up; yaw counter-clockwise
from x. `world` is the fixed map frame, `ego` the frame of the ego vehicle: origin at the centre of its body on the
ground, x along its heading. Images are RGB, uint8, (height, width, 3). Times are seconds of simulation or sensor clock.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8


class Command(str, Enum):
    """What the route asks for at the next decision; the values are the strings of the `command` topic."""

    LEFT = 'left'
    RIGHT = 'right'
    STRAIGHT = 'straight'
    FOLLOW = 'follow'
    LANE_LEFT = 'lane_left'
    LANE_RIGHT = 'lane_right'


COMMANDS = tuple(Command)  # this order is that of the one-hot code and of CARLA's RoadOption 1..6
FAMILIES = (
    'normal',
    'merging',
    'overtaking',
    'emergency_brake',
    'give_way',
    'traffic_sign',
    'parking_exit',
)  # scenario families of the simulator, named as the driving skills


@dataclass(frozen=True, kw_only=True)
class EgoState:
    """Where the ego vehicle is and how it moves; pose in the world frame, motion in the ego frame."""

    x: float
    y: float
    yaw: float
    speed: float  # m/s along the heading, negative in reverse
    acceleration: float = 0.0  # m/s^2 along the heading
    yaw_rate: float = 0.0  # rad/s
    since_stop: float = (
        100.0  # m driven since the last standstill; the memory that a stop sign needs
    )
    size: tuple[float, float, float] = (4.515, 1.852, 1.5)  # length, width, height in m


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """What the navigation says: two points on the route, in the ego frame, and the command."""

    near: Float[np.ndarray, '2']  # the route 10 m ahead
    far: Float[np.ndarray, '2']  # the route 25 m ahead
    command: Command


NEAR_M, FAR_M = 10.0, 25.0  # where on the route Guidance looks


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a policy may see of one moment: the cameras that are alive, itself, and where to go."""

    time: float
    images: Mapping[str, UInt8[np.ndarray, 'H W 3']]  # by camera name; a missing camera is absent
    ego: EgoState
    guidance: Guidance


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views worth a full look, as they travel from view router to driver.

    `image` stacks the chosen views vertically, each as its frames from the oldest to the newest, all at the bundle's
    view size: view v, frame f is rows ((v * frames + f) * height) to ((v * frames + f + 1) * height).
    """

    time: float
    names: tuple[str, ...]
    image: UInt8[np.ndarray, 'VFH W 3']
    weights: Mapping[str, float]  # each camera's score in 0..1; 0 where the camera is missing


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Where the centre of the ego vehicle will be; ego frame of the moment `time`, point i at (i + 1) * dt."""

    time: float
    dt: float
    xy: Float[np.ndarray, 'T 2']

    def __post_init__(self):
        if self.xy.ndim != 2 or self.xy.shape[1] != 2 or len(self.xy) == 0:
            raise ValueError(f'a trajectory is (T, 2) with T > 0, not {self.xy.shape}')

    def speeds(self) -> Float[np.ndarray, 'T']:
        """Return the mean speed of each segment; segment i ends at point i, the first begins at the vehicle."""
        steps = np.diff(np.vstack([np.zeros((1, 2)), self.xy]), axis=0)
        return np.hypot(*steps.T) / self.dt

    def times(self) -> Float[np.ndarray, 'T']:
        """Return seconds after `time` of each point."""
        return self.dt * np.arange(1, len(self.xy) + 1)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a policy answers: the trajectory, and for those that reason the skill chain and their scores."""

    trajectory: Trajectory
    skills: Mapping[str, str] = field(default_factory=dict)  # level -> skill, in order of depth
    action_skill: str = ''  # the skill that the action mixture chose
    views: tuple[str, ...] = ()
    timings_ms: Mapping[str, float] = field(default_factory=dict)  # stage -> milliseconds


class Policy(Protocol):
    """Anything that drives. The expert and other privileged policies read the scene; the rest must not."""

    def reset(self) -> None:
        """Forget the previous episode."""

    def plan(self, observation: Observation, scene: 'Scene') -> Plan:
        """Answer one observation."""


class Reasoner(Protocol):
    """A policy that can also say why."""

    def reason(self) -> Iterator[str]:
        """Yield the growing text about the newest plan, word by word."""


@dataclass(frozen=True, kw_only=True)
class VehicleCommand:
    """What the actuators get."""

    steer: float  # -1..1, positive = LEFT
    throttle: float  # 0..1
    brake: float  # 0..1


# ---- the annotated truth of a moment: from the simulator, or from a recorded clip ----


@dataclass(frozen=True, kw_only=True)
class Actor:
    """Anything on or beside the road but the ego vehicle; world frame, oriented box standing on the ground.

    kind: 'vehicle' | 'walker' | 'traffic_light' | 'traffic_sign' | 'static'
    type_id: CARLA-like: vehicle.car, vehicle.truck, vehicle.emergency, vehicle.parked, walker.pedestrian,
        traffic.traffic_light, traffic.stop, static.cone, static.barrier, static.building
    state: lights: 'red' | 'yellow' | 'green'; vehicles: '' | 'braking'; emergency vehicles: 'siren'
    """

    id: str
    kind: str
    type_id: str
    x: float
    y: float
    yaw: float
    size: tuple[float, float, float]  # length (along yaw), width, height in m
    velocity: tuple[float, float] = (0.0, 0.0)  # world frame, m/s
    state: str = ''
    affects_ego: bool = False  # lights and signs: whether they govern the ego's way, now
    stop_distance: float = float('inf')  # of what affects the ego: m from its FRONT to the line


@dataclass(frozen=True, kw_only=True)
class Corridor:
    """The way ahead: the route's centre line and how far beside it one may drive. World frame, about 1 m spacing.

    The route is the centre of the lane to be IN, so that after a lane change that is due, or beside a parking
    place, the ego starts with a lateral offset from it.
    """

    xy: Float[np.ndarray, 'N 2']
    left: Float[
        np.ndarray, 'N'
    ]  # m from the centre line to the left edge of what may be driven, opposing lanes included
    right: Float[np.ndarray, 'N']
    own_left: Float[np.ndarray, 'N']  # the same, but only lanes of our own direction
    lane_width: Float[np.ndarray, 'N']
    junction: np.ndarray  # (N,) bool
    speed_limit: Float[np.ndarray, 'N']  # m/s
    commands: Sequence[Command]  # (N,) what is asked for at each point


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The whole truth of one moment, for experts, label rules and judges; never for a policy that drives by looking."""

    time: float
    ego: EgoState
    actors: tuple[Actor, ...]
    corridor: Corridor  # from about 10 m behind the ego to at least 80 m ahead, or to the goal
    progress: float  # m along corridor.xy where the ego is (its projection)
    guidance: Guidance
    route_completion: float = 0.0  # 0..1
    family: str = ''  # scenario family, or Bench2Drive's scenario name
    weather: str = 'clear'

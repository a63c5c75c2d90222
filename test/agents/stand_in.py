"""What the Leaderboard is to an agent, without a server: its base classes' contract, and a road on which CARLA's Lincoln drives.

The classes are ours, written after the contract of carla-simulator/leaderboard and of Bench2Drive; the types, transforms and the
OpenDRIVE map are those of the carla wheel. The vehicle is the kinematic bicycle that core.carla.LINCOLN states.
"""

import enum
import math
import sys
import types

import numpy as np

from mose_ros.core.carla import ANTENNA_X, LINCOLN
from mose_ros.core.rig import CAMERAS

ORIGIN = (42.0, 2.0)  # latitude and longitude of the map
BEND = """<?xml version="1.0"?>
<OpenDRIVE>
  <header revMajor="1" revMinor="4" name="bend" version="1"/>
  <road name="bend" length="{length}" id="1" junction="-1">
    <link/>
    <planView>
      <geometry s="0" x="0" y="0" hdg="0" length="30"><line/></geometry>
      <geometry s="30" x="30" y="0" hdg="0" length="{arc}"><arc curvature="{curvature}"/></geometry>
      <geometry s="{end}" x="{x}" y="{y}" hdg="{hdg}" length="30"><line/></geometry>
    </planView>
    <lanes><laneSection s="0">
      <center><lane id="0" type="none"/></center>
      <right><lane id="-1" type="driving"><width sOffset="0" a="3.5" b="0" c="0" d="0"/></lane></right>
    </laneSection></lanes>
  </road>
</OpenDRIVE>"""


class RoadOption(enum.IntEnum):
    """CARLA's agents.navigation.local_planner.RoadOption."""

    VOID = -1
    LEFT = 1
    RIGHT = 2
    STRAIGHT = 3
    LANEFOLLOW = 4
    CHANGELANELEFT = 5
    CHANGELANERIGHT = 6


class Track(enum.Enum):
    SENSORS = 'SENSORS'
    MAP = 'MAP'


class AutonomousAgent:
    """The contract: constructed with host and port, then the plan, then setup, then one call a tick."""

    gap = 25  # m between the points of the plan that is handed out

    def __init__(self, carla_host, carla_port, debug=False):
        self.track = Track.SENSORS
        self._global_plan = self._global_plan_world_coord = None

    def set_global_plan(self, global_plan_gps, global_plan_world_coord):
        chosen, last = [], None
        for index, (transform, option) in enumerate(global_plan_world_coord):
            is_new = last is None or option != global_plan_world_coord[last][1]
            is_end = index == len(global_plan_world_coord) - 1
            if (
                is_new
                or is_end
                or transform.location.distance(global_plan_world_coord[last][0].location)
                > self.gap
            ):
                chosen.append(index)
                last = index
        self._global_plan = [global_plan_gps[index] for index in chosen]
        self._global_plan_world_coord = [global_plan_world_coord[index] for index in chosen]


class Bench2DriveAgent(AutonomousAgent):
    """Bench2Drive's base class measures the hero."""

    def get_metric_info(self):
        return {'acceleration': [0.0, 0.0, 0.0], 'location': [1.0, 2.0, 3.0]}


class ROS2Agent(AutonomousAgent):
    """The base class launches what the agent names, before setup."""

    def __init__(self, carla_host, carla_port, debug=False):
        super().__init__(carla_host, carla_port, debug)
        self.launched = self.get_ros_entrypoint()


def install(monkeypatch, base=AutonomousAgent) -> None:
    """Put the stand-in where `import leaderboard` finds it; modules of agents are imported anew."""
    contents = {
        'leaderboard': {},
        'leaderboard.autoagents': {},
        'leaderboard.autoagents.autonomous_agent': {'AutonomousAgent': base, 'Track': Track},
        'leaderboard.autoagents.ros2_agent': {'ROS2Agent': ROS2Agent},
    }
    for name, members in contents.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ('mose_agent', 'mose_ros_agent'):
        monkeypatch.delitem(sys.modules, f'mose_ros.agents.{name}', raising=False)


def bend(carla, turn: float, radius: float = 25.0):
    """Return a carla.Map: 30 m straight on, a bend of `turn` rad to CARLA's right, 30 m."""
    # OpenDRIVE is right-handed (y to the left), so there the bend has the other sign
    sign, arc = -math.copysign(1.0, turn), radius * abs(turn)
    xml = BEND.format(
        length=60 + arc,
        arc=arc,
        curvature=sign / radius,
        end=30 + arc,
        x=30 + radius * math.sin(abs(turn)),
        y=sign * radius * (1 - math.cos(turn)),
        hdg=sign * abs(turn),
    )
    return carla.Map('bend', xml)


def plan(town, option):
    """Return the global plan along the lane, a point a metre: fixes and transforms with their options."""
    way = [town.get_waypoint_xodr(1, -1, 1.0)]
    while ahead := way[-1].next(1.0):
        way.append(ahead[0])
    yaw = [point.transform.rotation.yaw for point in way]
    turned = [abs((one - yaw[0] + 180) % 360 - 180) for one in yaw]
    options = [option if 1.0 < one < turned[-1] - 1.0 else RoadOption.LANEFOLLOW for one in turned]
    world = [(point.transform, one) for point, one in zip(way, options, strict=True)]
    gps = []
    for transform, one in world:
        latitude, longitude = fix(transform.location.x, transform.location.y)
        gps.append(({'lat': latitude, 'lon': longitude, 'z': 0.0}, one))
    return gps, world


def fix(x: float, y: float) -> tuple[float, float]:
    """Return latitude and longitude of a CARLA place by the Leaderboard's formula."""
    scale = math.cos(math.radians(ORIGIN[0])) * 6378137.0
    north = math.log(math.tan(math.radians(90.0 + ORIGIN[0]) / 2.0)) - y / scale
    latitude = 2.0 * math.degrees(math.atan(math.exp(north))) - 90.0
    return latitude, ORIGIN[1] + math.degrees(x / scale)


class Lincoln:
    """CARLA's ego vehicle in CARLA's left-handed frame, with the sensors that our agent asks for."""

    def __init__(self, transform, seed: int = 0, noise: float = 5e-6):
        self.x, self.y = transform.location.x, transform.location.y
        self.yaw = math.radians(transform.rotation.yaw)  # clockwise
        self.speed = self.rate = self.acceleration = 0.0
        self.frame, self._noise = 0, noise
        self._random = np.random.default_rng(seed)
        self.brightness = 90

    def data(self):
        """Return what the Leaderboard's sensor interface gives: id -> (frame, data)."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        latitude, longitude = fix(self.x + ANTENNA_X * cos, self.y + ANTENNA_X * sin)
        scatter = self._random.normal(0.0, self._noise, 2)
        gnss = np.array([latitude + scatter[0], longitude + scatter[1], 0.0])
        compass = (self.yaw + math.pi / 2) % (2 * math.pi)
        imu = np.array([self.acceleration, 0, 9.81, 0, 0, self.rate, compass])
        picture = np.full((36, 64, 4), self.brightness, np.uint8)
        found = {f'rgb_{name}': picture for name in CAMERAS}
        found.update(gnss=gnss, imu=imu, speedometer={'speed': self.speed})
        return {name: (self.frame, value) for name, value in found.items()}

    def apply(self, control, dt: float = 0.05) -> None:
        """Drive one tick."""
        force = LINCOLN.throttle_gain * control.throttle - LINCOLN.brake_gain * control.brake
        before, self.frame = self.speed, self.frame + 1
        self.speed = max(0.0, self.speed + (force - 0.05 * self.speed) * dt)
        self.acceleration = (self.speed - before) / dt
        curvature = math.tan(LINCOLN.max_steer * control.steer) / LINCOLN.wheelbase
        slip = math.atan(curvature * LINCOLN.rear_axle)
        self.rate = self.speed * math.cos(slip) * curvature
        self.x += self.speed * math.cos(self.yaw + slip) * dt
        self.y += self.speed * math.sin(self.yaw + slip) * dt
        self.yaw += self.rate * dt

"""The node that says what CARLA leaves unsaid: odometry out of GNSS, IMU and speedometer, the Leaderboard's route and readiness.

CARLA's native ROS 2 publishes sensors only, and the Leaderboard gives an agent no odometry either: both are heard here. Pose and
speed are estimates then (core.carla.Localizer); the node complains when the fixes move another way than the compass points.
Sources: carla-simulator/carla (LibCarla/source/carla/ros2/publishers), carla-simulator/ros-bridge, carla-simulator/leaderboard.
"""

import importlib
import math
from dataclasses import dataclass

import numpy as np
from nav_msgs.msg import Odometry, Path
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Imu, NavSatFix
from std_msgs.msg import Bool, Float32, Header, String

from mose_ros.core import carla
from mose_ros.core.navigation import RouteFollower
from mose_ros.core.types import EgoState
from mose_ros.nodes import conversions
from mose_ros.nodes.lifecycle import (
    ERROR,
    LATCHED,
    NEWEST,
    OK,
    SENSOR,
    WARN,
    ManagedNode,
    NodeParameters,
    run_node,
)
from mose_ros.nodes.parameters import parameter

SAME_S = 1e-3  # stamps this near are of one tick
APART_S = 0.1  # a sensor that lags by more is not waited for
OLD_S = 0.2  # a speed is no older than that; it has no stamp, so by when it came
# The native IMU's orientation is pi/4 minus the compass (CarlaIMUPublisher.cpp halves a half pi), where REP-103 has pi/2.
NATIVE_YAW = math.pi / 4.0
FAR_OFF_M = 50.0  # from the route: the map's origin must be wrong
CHECK_M, CHECK_RAD = (
    4.0,
    0.4,
)  # over so many metres driven straight, course and compass agree to so much


@dataclass(frozen=True, kw_only=True)
class CarlaStateParameters(NodeParameters):
    """Parameters of the state estimation for CARLA."""

    role_name: str = parameter('hero', 'role of the vehicle in topic and frame names')
    imu: str = parameter(
        'bridge', "whose IMU: carla_ros_bridge's or native's", choices=('bridge', 'native')
    )
    latitude: float = parameter(0.0, "degrees of the map's origin (its geoReference)")
    longitude: float = parameter(0.0, "degrees of the map's origin (its geoReference)")
    mirrored_latitude: bool = parameter(
        False, 'the latitude grows to the south, as CARLA 0.9.16 projects'
    )
    antenna_x: float = parameter(carla.ANTENNA_X, 'm from the body centre forward to GNSS and IMU')
    gain: float = parameter(
        0.04, 'share of a fix in the next place; less is smoother', minimum=1e-3, maximum=1.0
    )
    speed_gain: float = parameter(
        0.2, 'share of a fix in the next speed, without speedometer', minimum=1e-3, maximum=1.0
    )
    has_speedometer: bool = parameter(True, 'hear /carla/<role>/speedometer')
    plan: str = parameter(
        'none',
        "type of the Leaderboard's global_plan: its own Path, Bench2Drive's CarlaRoute",
        choices=('none', 'auto', 'path', 'carla_route'),
    )
    announce: bool = parameter(False, 'latch /carla/<role>/status once all watched are active')
    watch: tuple[str, ...] = parameter(
        ('view_router', 'driver', 'controller'), 'nodes that must be active for that'
    )


class CarlaStateNode(ManagedNode):
    """Publishes `odometry` for each tick, and for the Leaderboard `route`, `command` and the status."""

    def __init__(self, **options):
        super().__init__('carla_state', CarlaStateParameters, **options)
        self._heard = []

    def configure(self) -> None:
        p = self.parameters
        self._frame = carla.GeoFrame.at(p.latitude, p.longitude, p.mirrored_latitude)
        self._localizer = carla.Localizer(p.antenna_x, p.gain, p.speed_gain)
        self._fix = self._imu = self._last = None
        self._speed, self._speed_at = 0.0, -math.inf
        self._corner: tuple[np.ndarray, float] | None = None  # fix and yaw where the check began
        self._route: RouteFollower | None = None
        self._is_route_told = False  # what comes before this node is active is told once it is
        self._awake, self._is_announced = set(), False
        publish, depth = self.create_lifecycle_publisher, QoSProfile(depth=10)
        self._odometry = publish(Odometry, 'odometry', depth)
        prefix, hear = f'/carla/{p.role_name}', self.create_subscription
        self._heard = [
            hear(NavSatFix, f'{prefix}/gnss', self.guarded('gnss', self._on_fix), depth),
            hear(Imu, f'{prefix}/imu', self.guarded('imu', self._on_imu), depth),
        ]
        if p.has_speedometer:
            speed = self.guarded('speedometer', self._on_speed)
            self._heard.append(hear(Float32, f'{prefix}/speedometer', speed, SENSOR))
        if p.plan != 'none':
            self._path = publish(Path, 'route', LATCHED)
            self._asked = publish(String, 'command', NEWEST)
            kind = self._plan_type(p.plan)
            plan = self.guarded('global_plan', self._on_plan)
            self._heard.append(hear(kind, f'{prefix}/global_plan', plan, LATCHED))
        if p.announce:
            self._status = publish(Bool, f'{prefix}/status', LATCHED)
            for name in p.watch:
                beat = self._waiter(name)
                self._heard.append(hear(Header, f'{name}/heartbeat', beat, SENSOR))

    def cleanup(self) -> None:
        for subscription in self._heard:
            self.destroy_subscription(subscription)
        self._heard = []

    def _plan_type(self, plan: str) -> type:
        if plan == 'path':
            return Path
        try:
            return importlib.import_module('carla_msgs.msg').CarlaRoute
        except (ImportError, AttributeError):
            if plan == 'carla_route':
                raise ValueError(
                    "plan 'carla_route' needs carla_msgs with CarlaRoute: Bench2Drive's copy of it"
                ) from None
            return Path

    # ---- readiness ----

    def _waiter(self, name: str):
        def beat(msg: Header):
            (self._awake.add if msg.frame_id == 'active' else self._awake.discard)(name)
            is_ready = self._awake >= set(self.parameters.watch)
            if self.is_active and is_ready and not self._is_announced:
                self._is_announced = True
                self._status.publish(Bool(data=True))
                self.report('status', OK, 'announced: all nodes are active')

        return beat

    # ---- the Leaderboard's route ----

    def _on_plan(self, msg) -> None:
        poses = [getattr(pose, 'pose', pose) for pose in msg.poses]  # stamped in a Path
        points = np.array([(pose.position.x, pose.position.y) for pose in poses], float)
        conversions.check_places(points, 'the global plan')
        options = getattr(msg, 'road_options', None)
        commands = None if options is None else [carla.command(int(one)) for one in options]
        if commands is not None and len(commands) != len(points):
            raise ValueError(f'{len(commands)} road options for {len(points)} places')
        self._route = RouteFollower(points.reshape(-1, 2), commands=commands)
        self._is_route_told = False
        self._tell_route()
        self.report('global_plan', OK, f'{len(points)} places')

    def _tell_route(self) -> None:
        if self._route is None or self._is_route_told or not self.is_active:
            return
        self._is_route_told = True
        stamp = conversions.to_stamp(self.now())
        self._path.publish(conversions.polyline_to_msg(self._route.points, stamp, 'map'))

    # ---- odometry ----

    def _on_fix(self, msg: NavSatFix) -> None:
        self._frame.point(msg.latitude, msg.longitude)  # or it is refused here, before it is kept
        self._fix = msg
        self._match()

    def _on_imu(self, msg: Imu) -> None:
        conversions.yaw_of(msg.orientation)  # or it is refused here, before it is kept
        self._imu = msg
        self._match()

    def _on_speed(self, msg: Float32) -> None:
        if not math.isfinite(msg.data) or abs(msg.data) > 150:
            raise ValueError(f'a speed of {msg.data} m/s is no car')
        self._speed, self._speed_at = float(msg.data), self.now()

    def _match(self) -> None:
        """Answer once both sensors have spoken of a tick; one that lags behind is left out."""
        if not self.is_active or self._fix is None:
            return
        self._tell_route()
        at = conversions.seconds(self._fix.header.stamp)
        turned = None if self._imu is None else conversions.seconds(self._imu.header.stamp)
        if turned is None or at - turned > APART_S:
            self.report('imu', WARN, 'none at the time of the fixes: no odometry')
            return
        if abs(at - turned) > SAME_S or at == self._last:
            return  # the other one of this tick is on its way, or the tick is answered
        self._last = at
        self.report('imu', OK, 'arrives')
        self._publish(at)

    def _publish(self, time: float) -> None:
        p, imu = self.parameters, self._imu
        is_native = p.imu == 'native'
        yaw = conversions.yaw_of(imu.orientation) + (NATIVE_YAW if is_native else 0.0)
        rate = imu.angular_velocity.z * (-1.0 if is_native else 1.0)
        fix = self._frame.point(self._fix.latitude, self._fix.longitude)
        if p.has_speedometer and not 0.0 <= self.now() - self._speed_at <= OLD_S:
            said = 'silent: no odometry; mend it, or set has_speedometer false'
            self.report('speedometer', ERROR, said)
            return
        self.report('speedometer', OK, 'arrives')
        state = self._localizer.update(
            time,
            fix=fix,
            yaw=carla.wrap(yaw),
            yaw_rate=rate,
            speed=self._speed if p.has_speedometer else None,
            acceleration=imu.linear_acceleration.x,
        )
        msg = conversions.ego_to_msg(state, self._fix.header.stamp, 'map', p.role_name)
        self._odometry.publish(msg)
        self._check_course(fix, state)
        if self._route is not None:
            self._follow(state)

    def _follow(self, state: EgoState) -> None:
        """Say what the route asks for, and complain when it is nowhere near."""
        guidance = self._route.guidance(state)
        self._asked.publish(String(data=guidance.command.value))
        foot = self._route.point(self._route.progress)
        off = math.hypot(foot[0] - state.x, foot[1] - state.y)
        if off > FAR_OFF_M:
            said = f'{off:.0f} m away from the fixes: check `latitude` and `longitude`'
            self.report('route', ERROR, said)
        else:
            self.report('route', OK, 'near')

    def _check_course(self, fix: np.ndarray, state: EgoState) -> None:
        """Complain when the fixes move another way than the compass points: a wrong convention is worse than none."""
        if self._corner is None or abs(carla.wrap(state.yaw - self._corner[1])) > 0.1:
            self._corner = (fix, state.yaw)
            return
        driven = fix - self._corner[0]
        if np.hypot(*driven) < CHECK_M:
            return
        off = carla.wrap(math.atan2(driven[1], driven[0]) - state.yaw)
        self._corner = (fix, state.yaw)
        if abs(off) > CHECK_RAD and (not self.parameters.has_speedometer or state.speed > 0):
            said = f'the fixes move {math.degrees(off):.0f} degrees off the compass'
            self.report('course', ERROR, f'{said}: check `imu` and `mirrored_latitude`')
        else:
            self.report('course', OK, 'fixes and compass agree')


def main() -> None:
    """Run this node until it is told to end."""
    run_node(CarlaStateNode)


if __name__ == '__main__':
    main()

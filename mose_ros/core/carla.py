"""CARLA's numbers in our conventions and back: frames, commands, the rig, the globe, and where the vehicle is.

A live CARLA is left-handed (y to the right, yaw clockwise in degrees, a compass that is 0 in the north): here it meets REP-103,
for the nodes and for the in-process agents alike. Recorded annotations are `data.annotation`'s. Plain numbers: knows neither
the carla module nor ROS.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from mose_ros.core.control import VehicleModel
from mose_ros.core.rig import RIG, Camera
from mose_ros.core.types import COMMANDS, Command, EgoState

EARTH_RADIUS_M = 6378137.0  # of CARLA's projection
ANTENNA_X = -1.4  # m from the body's centre: where Bench2Drive's agents have GNSS and IMU
MAX_ACCELERATION, MAX_TURN_RATE, MAX_SPEED = 200.0, 50.0, 150.0  # SI; more is no car's measurement
JUMP_M, JUMPS = 30.0, 10  # a fix this far off is not believed, so many in a row are
MIN_SPAN_M = 20.0  # of a route, below which its fixes don't tell a scale
SAME_SCALE = 0.2  # share by which a poor fit of a scale may be off, for its sign to be believed
EGO_VEHICLE = 'vehicle.lincoln.mkz_2020'  # what Leaderboard 2 and Bench2Drive drive
WHEEL_ANGLE = 1.2217  # rad of that vehicle's front wheels at steer 1, standing: vehicle_info's max_steer_angle

# Steering: the kinematic bicycle that "Learning to drive from a world on rails" (Chen, Koltun, Kraehenbuehl 2021) fitted to CARLA's
# Lincoln, whose constants later agents for CARLA kept: steer 1 turns as 0.368 rad on an effective wheelbase of 1.327 m.
# Its brake: 4.95 m/s^2 at brake 1. Throttle and hold: round figures, measured by nobody here; the tracker's feedback covers them.
LINCOLN = VehicleModel(
    wheelbase=1.327,
    rear_axle=1.418,
    max_steer=0.368,
    steer_rate=4.0,
    throttle_gain=4.0,
    brake_gain=4.95,
    max_deceleration=8.0,
    hold_brake=0.5,
)


# ---- frames and commands ----


def wrap(angle: float) -> float:
    """Return the angle in -pi..pi."""
    return (angle + math.pi) % (2.0 * math.pi) - math.pi


def pose(x: float, y: float, yaw_deg: float) -> tuple[float, float, float]:
    """Return x, y, yaw of a CARLA place in our world frame."""
    return float(x), -float(y), wrap(-math.radians(yaw_deg))


def compass_yaw(compass: float) -> float:
    """Return the yaw of an IMU's compass: 0 in the north, which is CARLA's -y, growing clockwise."""
    return wrap(math.pi / 2.0 - compass)


def command(option: Any) -> Command:
    """Return what a RoadOption asks for: an enum or its number; VOID and what CARLA may add ask for nothing."""
    number = int(getattr(option, 'value', option))
    return COMMANDS[number - 1] if 1 <= number <= len(COMMANDS) else Command.FOLLOW


# ---- the rig ----


def sensor_id(name: str) -> str:
    """Return what our rig's camera is called in CARLA: its id, its topic and its folder in a clip."""
    return f'rgb_{name}'


def sensors(width: int = 1600, height: int = 900) -> list[dict[str, Any]]:
    """Return what an agent of the Leaderboard asks for: the rig, GNSS, IMU and speedometer, in CARLA's frame."""
    mount = {'x': ANTENNA_X, 'y': 0.0, 'z': 0.0, 'roll': 0.0, 'pitch': 0.0, 'yaw': 0.0}
    cameras = [
        {
            'type': 'sensor.camera.rgb',
            'id': sensor_id(camera.name),
            **_mount(camera, mirror=True),
            'width': width,
            'height': height,
            'fov': _degrees(camera.fov),
        }
        for camera in RIG
    ]
    return [
        *cameras,
        {'type': 'sensor.other.gnss', 'id': 'gnss', **mount},
        {'type': 'sensor.other.imu', 'id': 'imu', **mount},
        {'type': 'sensor.speedometer', 'id': 'speedometer', 'reading_frequency': 20},
    ]


def objects(
    role: str = 'ego_vehicle', width: int = 1600, height: int = 900, vehicle: str = EGO_VEHICLE
) -> dict[str, Any]:
    """Return carla_spawn_objects' objects.json: the vehicle with the rig and the pseudo sensors that our nodes hear.

    The bridge mirrors spawn points itself, so they stand in REP-103: y and yaw to the left, degrees.
    """
    if width < 1 or height < 1:
        raise ValueError(f'pictures of {width}x{height}: both must be positive')
    mount = {'x': ANTENNA_X, 'y': 0.0, 'z': 0.0, 'roll': 0.0, 'pitch': 0.0, 'yaw': 0.0}
    cameras = [
        {
            'type': 'sensor.camera.rgb',
            'id': sensor_id(camera.name),
            'spawn_point': _mount(camera, mirror=False),
            'image_size_x': width,
            'image_size_y': height,
            'fov': _degrees(camera.fov),
        }
        for camera in RIG
    ]
    pseudo = [
        {'type': 'sensor.pseudo.odom', 'id': 'odometry'},
        {'type': 'sensor.pseudo.speedometer', 'id': 'speedometer'},
        {'type': 'sensor.pseudo.tf', 'id': 'tf'},
    ]
    fixes = [
        {'type': 'sensor.other.gnss', 'id': 'gnss', 'spawn_point': mount},
        {'type': 'sensor.other.imu', 'id': 'imu', 'spawn_point': mount},
    ]
    ego = {'type': vehicle, 'id': role, 'sensors': [*cameras, *fixes, *pseudo]}
    return {'objects': [ego]}


def _mount(camera: Camera, mirror: bool) -> dict[str, float]:
    side = -1.0 if mirror else 1.0
    place = {'x': camera.x, 'y': side * camera.y, 'z': camera.z}
    angles = {'pitch': side * _degrees(camera.pitch), 'yaw': side * _degrees(camera.yaw)}
    return {**{k: round(v, 6) + 0.0 for k, v in place.items()}, 'roll': 0.0, **_plain(angles)}


def _plain(angles: dict[str, float]) -> dict[str, float]:
    """Write the half turn as +180 and zero without a sign."""
    return {name: 180.0 if value == -180.0 else value + 0.0 for name, value in angles.items()}


def _degrees(angle: float) -> float:
    return round(math.degrees(float(angle)), 6)


# ---- the globe ----


@dataclass(frozen=True, kw_only=True)
class GeoFrame:
    """Latitude and longitude as metres of the map, in our frame: Mercator, then a straight line on each axis.

    CARLA up to 0.9.15 and the Leaderboard project so, exactly. The newer transverse Mercator (0.9.16) differs from the best
    line by under half a metre within 2 km, and lets the latitude grow with its y, so to the right: `y_scale` is negative there.
    """

    x_scale: float  # m a radian of longitude
    x_offset: float
    y_scale: float  # m a radian of Mercator's latitude
    y_offset: float

    @classmethod
    def at(cls, latitude: float, longitude: float, mirrored: bool = False) -> 'GeoFrame':
        """Return the frame of a map whose origin lies there (its geoReference); `mirrored`: latitude grows to the right."""
        scale = math.cos(math.radians(latitude)) * EARTH_RADIUS_M
        y_scale = -scale if mirrored else scale
        return cls(
            x_scale=scale,
            x_offset=-scale * math.radians(longitude),
            y_scale=y_scale,
            y_offset=-y_scale * _mercator(latitude),
        )

    @classmethod
    def fit(
        cls, degrees: Float[np.ndarray, 'N 2'], points: Float[np.ndarray, 'N 2']
    ) -> 'GeoFrame':
        """Return the frame in which a route's latitudes and longitudes are its points; ValueError if it is too short.

        Mercator keeps angles, so an axis along which the route hardly extends takes the other one's scale; the sign of its
        own tells a mirrored map as long as its size is about right.
        """
        is_sound = (np.abs(degrees) <= (89.0, 360.0)).all() and (np.abs(points) <= 1e8).all()
        if not is_sound:  # NaN neither
            raise ValueError(
                'the global plan holds numbers that are not finite or no place on Earth'
            )
        angles = np.stack(
            [np.radians(degrees[:, 1]), [_mercator(float(one)) for one in degrees[:, 0]]], 1
        )
        spans = np.ptp(points, axis=0)
        if spans.max() < MIN_SPAN_M:
            raise ValueError(
                f'a route of {spans.max():.1f} m tells no scale; {MIN_SPAN_M:.0f} m or more do'
            )
        middle, centre = angles.mean(0), points.mean(0)
        d, p = angles - middle, points - centre
        with np.errstate(divide='ignore', invalid='ignore'):
            scales = (d * p).sum(0) / (d * d).sum(0)
        for axis in (0, 1):
            if spans[axis] < MIN_SPAN_M:
                scale = abs(scales[1 - axis])
                mirrored = abs(scales[axis] + scale) < SAME_SCALE * scale  # not so if it is NaN
                scales[axis] = -scale if mirrored else scale
        if not np.isfinite(scales).all() or not scales.all():
            raise ValueError('the fixes of the global plan do not move as its places do')
        offsets = centre - scales * middle
        return cls(
            x_scale=float(scales[0]),
            x_offset=float(offsets[0]),
            y_scale=float(scales[1]),
            y_offset=float(offsets[1]),
        )

    def point(self, latitude: float, longitude: float) -> Float[np.ndarray, '2']:
        """Return the place of a fix; ValueError where there is none on the map's projection."""
        if not (abs(latitude) <= 89.0 and abs(longitude) <= 360.0):
            raise ValueError(f'a fix at {latitude}, {longitude} is none')
        x = self.x_scale * math.radians(longitude) + self.x_offset
        return np.array([x, self.y_scale * _mercator(latitude) + self.y_offset])


def _mercator(latitude: float) -> float:
    return math.log(math.tan(math.pi / 4.0 + math.radians(latitude) / 2.0))


# ---- where the vehicle is ----


class Localizer:
    """Pose and motion from fixes, compass, gyroscope and, where there is one, a speedometer.

    Dead reckoning, drawn to each fix by `gain`: the Leaderboard's fixes scatter by half a metre, its other sensors hardly. Without
    a speedometer the speed is drawn to the fixes as well, by `speed_gain`, and led by the accelerometer.
    """

    def __init__(self, antenna_x: float = ANTENNA_X, gain: float = 0.04, speed_gain: float = 0.2):
        if not (0 < gain <= 1 and 0 < speed_gain <= 1):
            raise ValueError(f'gains lie in 0..1, not {gain}, {speed_gain}')
        self._antenna_x, self._gain, self._speed_gain = antenna_x, gain, speed_gain
        self.clear()

    def clear(self) -> None:
        """Forget everything; for when time goes backwards."""
        self._time: float | None = None
        self._place = np.zeros(2)
        self._yaw = self._speed = 0.0
        self._fixes = self._jumps = 0

    @property
    def is_placed(self) -> bool:
        """Say whether there has been a fix."""
        return self._fixes > 0

    def update(
        self,
        time: float,
        *,
        fix: Float[np.ndarray, '2'] | None,
        yaw: float | None,
        yaw_rate: float,
        speed: float | None = None,
        acceleration: float = 0.0,
    ) -> EgoState:
        """Take one moment's measurements and return the state; what is not finite or no car's counts as not measured."""
        dt = 0.0 if self._time is None else max(0.0, time - self._time)
        if self._time is not None and time < self._time:
            self.clear()
        self._time = time
        yaw_rate = _believed(yaw_rate, MAX_TURN_RATE, 0.0)
        acceleration = _believed(acceleration, MAX_ACCELERATION, 0.0)
        before = self._yaw
        self._yaw = wrap(_believed(yaw, 4.0 * math.pi, before + yaw_rate * dt))
        speed = _believed(speed, MAX_SPEED, None)
        has_speedometer = speed is not None
        guess = self._speed + acceleration * dt
        self._speed = speed if has_speedometer else max(-MAX_SPEED, min(guess, MAX_SPEED))
        middle = before + 0.5 * wrap(self._yaw - before) if self._fixes else self._yaw
        self._place = self._place + self._speed * dt * _forward(middle)
        if fix is not None and np.isfinite(fix).all():
            self._correct(fix - self._antenna_x * _forward(self._yaw), dt, has_speedometer)
        return EgoState(
            x=float(self._place[0]),
            y=float(self._place[1]),
            yaw=self._yaw,
            speed=self._speed,
            yaw_rate=yaw_rate,
        )

    def _correct(self, measured, dt: float, has_speedometer: bool) -> None:
        off = measured - self._place
        if self._fixes and np.hypot(*off) > JUMP_M:
            self._jumps += 1
            if self._jumps < JUMPS:
                return
            self._fixes = 0  # it has been set down elsewhere
        self._fixes, self._jumps = self._fixes + 1, 0
        # the first fixes are averaged, so that one of them alone does not set the place
        self._place = self._place + max(self._gain, 1.0 / self._fixes) * off
        if not has_speedometer and self._fixes > 1 and dt > 0:
            change = self._speed_gain * float(off @ _forward(self._yaw)) / max(dt, 0.05)
            self._speed = max(-MAX_SPEED, min(self._speed + change, MAX_SPEED))


def _forward(yaw: float) -> Float[np.ndarray, '2']:
    return np.array([math.cos(yaw), math.sin(yaw)])


def _believed(value: float | None, limit: float, otherwise: float | None) -> float | None:
    return float(value) if value is not None and abs(value) <= limit else otherwise

"""Between ROS messages and core types. Trusts nothing that comes in: sizes, encodings and numbers are checked, ValueError
says what is wrong with what. Knows no node and no topic; pictures are in `images`, RViz markers in `markers`.
"""

import math

import numpy as np
from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import PoseStamped, Quaternion, Transform, Twist
from jaxtyping import Float
from nav_msgs.msg import Odometry, Path
from std_msgs.msg import Float32MultiArray, Header, MultiArrayDimension, String
from trajectory_msgs.msg import MultiDOFJointTrajectory, MultiDOFJointTrajectoryPoint

from mose_ros.core.types import Command, EgoState, Plan, Trajectory, Views
from mose_ros.nodes.images import image_from_msg, image_to_msg

MAX_ROUTE_POINTS = 100_000
MAX_TRAJECTORY_POINTS = 1_000
MAX_PLACE_M = 1e8  # no frame on this planet reaches further; squares of it are still exact enough to divide by
MAX_TURN_RATE = 50.0  # rad/s
SKILL_SEPARATOR = ' > '


# ---- time and poses ----


def seconds(stamp: Time) -> float:
    """Return a stamp in seconds."""
    return stamp.sec + stamp.nanosec * 1e-9


def to_stamp(time: float) -> Time:
    """Return seconds as a stamp; the inverse of `seconds` to within 0.3 microseconds of today's clock."""
    if not abs(time) < 2**31 - 1:
        raise ValueError(f'{time} s fit into no stamp')
    whole = math.floor(time)
    nanosec = round((time - whole) * 1e9)
    return Time(sec=whole + nanosec // 1_000_000_000, nanosec=nanosec % 1_000_000_000)


def quaternion(yaw: float) -> Quaternion:
    """Return a turn about z."""
    return Quaternion(z=math.sin(yaw / 2), w=math.cos(yaw / 2))


def yaw_of(turn: Quaternion) -> float:
    """Return the yaw of a quaternion of any positive length; ValueError when it is none."""
    values = (turn.x, turn.y, turn.z, turn.w)
    norm = math.sqrt(sum(value * value for value in values)) if all_finite(values) else math.nan
    if not 1e-3 < norm < 1e3:
        raise ValueError(f'orientation {values} is no quaternion')
    x, y, z, w = (value / norm for value in values)
    return math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))


def all_finite(values) -> bool:
    """Say whether all of the numbers are finite."""
    return all(math.isfinite(value) for value in values)


def check_places(xy: np.ndarray, what: str) -> None:
    """Raise ValueError for places that are not finite or not on this planet."""
    if not np.isfinite(xy).all():
        raise ValueError(f'{what} is not finite')
    if np.abs(xy).max(initial=0.0) > MAX_PLACE_M:
        raise ValueError(f'{what} leads {np.abs(xy).max():.3g} m away')


# ---- odometry, route, command ----


def ego_from_msg(msg: Odometry) -> EgoState:
    """Read pose and motion; acceleration and memory are `navigation.EgoHistory`'s."""
    position, twist = msg.pose.pose.position, msg.twist.twist
    values = (position.x, position.y, twist.linear.x, twist.angular.z)
    if not all_finite(values):
        raise ValueError(f'odometry is not finite: x, y, speed, yaw rate = {values}')
    if abs(twist.linear.x) > 150:
        raise ValueError(f'odometry: a speed of {twist.linear.x} m/s is no car')
    if abs(twist.angular.z) > MAX_TURN_RATE:
        raise ValueError(f'odometry: a yaw rate of {twist.angular.z} rad/s is no car')
    check_places(np.array(values[:2]), 'odometry')
    return EgoState(
        x=position.x,
        y=position.y,
        yaw=yaw_of(msg.pose.pose.orientation),
        speed=twist.linear.x,
        yaw_rate=twist.angular.z,
    )


def ego_to_msg(ego: EgoState, stamp: Time, frame: str, child: str) -> Odometry:
    """Fill odometry: pose in `frame`, motion in `child`."""
    msg = Odometry(header=Header(stamp=stamp, frame_id=frame), child_frame_id=child)
    msg.pose.pose.position.x, msg.pose.pose.position.y = float(ego.x), float(ego.y)
    msg.pose.pose.orientation = quaternion(ego.yaw)
    msg.twist.twist.linear.x = float(ego.speed)
    msg.twist.twist.angular.z = float(ego.yaw_rate)
    return msg


def polyline_from_msg(msg: Path) -> Float[np.ndarray, 'N 2']:
    """Read the points of a path; `navigation.RouteFollower` judges them."""
    if len(msg.poses) > MAX_ROUTE_POINTS:
        raise ValueError(f'a route of {len(msg.poses)} points is too long')
    poses = [(pose.pose.position.x, pose.pose.position.y) for pose in msg.poses]
    points = np.array(poses, float).reshape(-1, 2)
    check_places(points, 'the route')
    return points


def polyline_to_msg(points: Float[np.ndarray, 'N 2'], stamp: Time, frame: str) -> Path:
    """Fill a path whose poses look along it."""
    msg = Path(header=Header(stamp=stamp, frame_id=frame))
    headings = np.arctan2(*np.gradient(points, axis=0).T[::-1])
    for (x, y), yaw in zip(points, headings, strict=True):
        pose = PoseStamped(header=msg.header)
        pose.pose.position.x, pose.pose.position.y = float(x), float(y)
        pose.pose.orientation = quaternion(float(yaw))
        msg.poses.append(pose)
    return msg


def command_from_msg(msg: String) -> Command:
    """Read what the route asks for."""
    try:
        return Command(msg.data.strip().lower())
    except ValueError:
        known = ', '.join(command.value for command in Command)
        raise ValueError(f'unknown command {msg.data[:40]!r}; known: {known}') from None


# ---- views ----


def views_to_msg(views: Views, stamp: Time):
    """Fill the stacked picture; frame_id holds the views' names, comma-separated."""
    return image_to_msg(views.image, stamp, ','.join(views.names))


def views_from_msg(msg) -> Views:
    """Read the stacked picture. Weights travel on their own topic and are empty here."""
    names = tuple(msg.header.frame_id.split(','))
    if not all(names) or len(set(names)) != len(names):
        raise ValueError(f'views: frame_id {msg.header.frame_id[:80]!r} is no list of cameras')
    image = image_from_msg(msg)
    if image.shape[0] % len(names):
        raise ValueError(f'views: {image.shape[0]} rows are not {len(names)} equal views')
    return Views(time=seconds(msg.header.stamp), names=names, image=image, weights={})


def weights_to_msg(views: Views) -> Float32MultiArray:
    """Fill one weight for each camera; the dimensions' labels are the names."""
    msg = Float32MultiArray(data=[float(weight) for weight in views.weights.values()])
    msg.layout.dim = [MultiArrayDimension(label=name, size=1, stride=1) for name in views.weights]
    return msg


# ---- plans ----


def trajectory_to_msg(trajectory: Trajectory, stamp: Time, frame: str) -> MultiDOFJointTrajectory:
    """Fill points in `frame` at the moment of the stamp; heading along the way, speed of each segment."""
    check_places(trajectory.xy, 'a trajectory to publish')
    header = Header(stamp=stamp, frame_id=frame)
    msg = MultiDOFJointTrajectory(header=header, joint_names=[frame])
    rows = zip(
        trajectory.xy, _headings(trajectory), trajectory.speeds(), trajectory.times(), strict=True
    )
    for (x, y), yaw, speed, time in rows:
        place, motion = Transform(rotation=quaternion(yaw)), Twist()
        place.translation.x, place.translation.y = float(x), float(y)
        motion.linear.x = float(speed)
        point = MultiDOFJointTrajectoryPoint(transforms=[place], velocities=[motion])
        point.time_from_start = _duration(float(time))
        msg.points.append(point)
    return msg


def trajectory_from_msg(msg: MultiDOFJointTrajectory) -> Trajectory:
    """Read a trajectory of one body in equal time steps; ValueError for anything else."""
    if not 2 <= len(msg.points) <= MAX_TRAJECTORY_POINTS:
        raise ValueError(
            f'a trajectory has 2..{MAX_TRAJECTORY_POINTS} points, not {len(msg.points)}'
        )
    if any(len(point.transforms) != 1 for point in msg.points):
        raise ValueError('each point of a trajectory has one transform')
    places = [point.transforms[0].translation for point in msg.points]
    xy = np.array([(place.x, place.y) for place in places], float)
    times = np.array([seconds(point.time_from_start) for point in msg.points])
    dt = float(times[-1] / len(times))
    check_places(xy, 'the trajectory')
    if dt <= 0 or np.abs(times - dt * np.arange(1, len(times) + 1)).max() > 0.01 * dt + 1e-6:
        raise ValueError(f'the times of the trajectory are not equal steps: {times[:4]} ...')
    return Trajectory(time=seconds(msg.header.stamp), dt=dt, xy=xy)


def trajectory_to_path(trajectory: Trajectory, stamp: Time, frame: str) -> Path:
    """Fill the same as a path for RViz; the stamp of each pose is its time."""
    msg = Path(header=Header(stamp=stamp, frame_id=frame))
    start = seconds(stamp)
    rows = zip(trajectory.xy, _headings(trajectory), trajectory.times(), strict=True)
    for (x, y), yaw, time in rows:
        pose = PoseStamped(header=Header(stamp=to_stamp(start + float(time)), frame_id=frame))
        pose.pose.position.x, pose.pose.position.y = float(x), float(y)
        pose.pose.orientation = quaternion(yaw)
        msg.poses.append(pose)
    return msg


def skills_to_msg(plan: Plan) -> String:
    """Fill the skill chain, `vehicle > cut_in > give_way`."""
    return String(data=SKILL_SEPARATOR.join(plan.skills.values()))


def _headings(trajectory: Trajectory) -> list[float]:
    """Return the heading of each segment; where the vehicle stands it keeps the last one."""
    headings, last = [], 0.0
    for dx, dy in np.diff(np.vstack([np.zeros((1, 2)), trajectory.xy]), axis=0):
        if math.hypot(dx, dy) > 0.05:
            last = math.atan2(dy, dx)
        headings.append(last)
    return headings


def _duration(time: float) -> Duration:
    stamp = to_stamp(time)
    return Duration(sec=stamp.sec, nanosec=stamp.nanosec)

"""Every message boundary against messages that nobody should send: each is answered with finite numbers or refused by ValueError.

Messages are what can come over the wire, mostly nearly right ones. The process may take 1 GiB more than it has, so that nothing
is allocated because a header claims it. `make fuzz` sends 100,000 of them; here it is a few hundred, the same ones each time.
"""

import contextlib
import dataclasses
import math
import resource
import struct
import zlib
from array import array
from collections import Counter
from pathlib import Path as File
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip('rclpy', reason='rclpy is not installed: pip install -e ".[ros]"')

import rclpy
from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import Point, Pose, PoseStamped, Quaternion, Transform, Twist, Vector3
from nav_msgs.msg import Odometry, Path
from rclpy.node import Node
from rclpy.parameter import Parameter
from sensor_msgs.msg import CompressedImage, Image, Imu, JointState, NavSatFix
from std_msgs.msg import Float32, Header, String
from trajectory_msgs.msg import MultiDOFJointTrajectory, MultiDOFJointTrajectoryPoint

from mose_ros.agents.pilot import AgentConfig, Pilot, Senses, follow_plan
from mose_ros.core.action import proprio
from mose_ros.core.carla import GeoFrame, sensor_id
from mose_ros.core.control import METADRIVE, TrajectoryTracker
from mose_ros.core.navigation import EgoHistory, RouteFollower
from mose_ros.core.rig import CAMERAS
from mose_ros.core.types import Plan, Trajectory, VehicleCommand
from mose_ros.nodes import conversions, images
from mose_ros.nodes import vehicle_command as words
from mose_ros.nodes.carla_state_node import CarlaStateNode
from mose_ros.nodes.controller_node import ControllerParameters
from mose_ros.nodes.driver_node import DriverParameters
from mose_ros.nodes.files import check_params_file
from mose_ros.nodes.parameters import declare
from mose_ros.nodes.view_router_node import ViewRouterParameters

SHORT = 100  # messages a boundary
HEADROOM = 2**30  # bytes
ALL_CHECKS = list(HealthCheck)

# ---- what can come over the wire ----

EDGES = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 1e8, 1e18]
WILD = st.one_of(st.floats(-50, 50), st.sampled_from(EDGES), st.floats())
TAME = st.floats(-50, 50)
# so that whole messages are often right
MIXED = st.sampled_from([False] * 40 + [True]).flatmap(lambda is_wild: WILD if is_wild else TAME)
UINT32 = st.one_of(st.integers(0, 64), st.sampled_from([8192, 8193, 2**31, 2**32 - 1]))
NAMES = st.one_of(
    st.sampled_from(['front', 'back', 'front,back', 'front,', ',', 'front,front']),
    st.text(max_size=300),
)
TIMES = st.builds(
    Time,
    sec=st.one_of(st.integers(0, 100), st.integers(-(2**31), 2**31 - 1)),
    nanosec=st.one_of(st.just(0), st.integers(0, 2**32 - 1)),
)
HEADERS = st.builds(Header, stamp=TIMES, frame_id=NAMES)
TURNS = st.builds(Quaternion, x=MIXED, y=MIXED, z=MIXED, w=MIXED)
VECTORS = st.builds(Vector3, x=MIXED, y=MIXED, z=MIXED)
POSES = st.builds(Pose, position=st.builds(Point, x=MIXED, y=MIXED), orientation=TURNS)
ENCODINGS = st.sampled_from([*images._CHANNELS, *images._CHANNELS, '', '16UC1', 'RGB8', 'x' * 999])


def to_array(data: bytes) -> array:
    return array('B', data)


@st.composite
def pictures(draw):
    """Draw a picture, often with one thing wrong with it."""
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    encoding = draw(ENCODINGS)
    step = width * images._CHANNELS.get(encoding, 3) + draw(st.sampled_from([0, 0, 5]))
    msg = Image(header=draw(HEADERS), height=height, width=width, encoding=encoding, step=step)
    msg.is_bigendian = draw(st.integers(0, 255))
    length = draw(st.sampled_from([step * height] * 4 + [0, 1, step * height - 1, 4000]))
    msg.data = to_array(draw(st.binary(min_size=8, max_size=8)) * (length // 8 + 1))[:length]
    for name in draw(st.sets(st.sampled_from(['height', 'width', 'step']), max_size=1)):
        setattr(msg, name, draw(UINT32))
    return msg


GREY = np.tile(np.arange(24, dtype=np.uint8), (16, 1))
WHOLE = {kind: cv2.imencode(kind, GREY)[1].tobytes() for kind in ('.png', '.jpg', '.bmp', '.webp')}


@st.composite
def compressed(draw):
    """Draw a compressed picture: a size that is claimed and not there, bytes that are other, missing or too many."""
    kind = draw(st.sampled_from(['.png', '.png', '.jpg', '.jpg', '.bmp', '.webp']))
    data = bytearray(WHOLE[kind])
    what = draw(st.sampled_from(['nothing', 'claim', 'flip', 'cut', 'grow', 'noise']))
    if what == 'claim' and kind == '.png':
        data[16:24] = struct.pack('>II', draw(UINT32), draw(UINT32))
        data[29:33] = struct.pack('>I', zlib.crc32(data[12:29]))
    elif what == 'claim' and kind == '.jpg':
        at = data.index(b'\xff\xc0') + 5
        data[at : at + 4] = struct.pack('>HH', *draw(st.tuples(*[st.integers(0, 65535)] * 2)))
    elif what == 'flip':
        for at in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
            data[at] = draw(st.integers(0, 255))
    elif what == 'cut':
        del data[draw(st.integers(0, len(data))) :]
    elif what == 'grow':
        data += draw(st.binary(max_size=50))
    elif what == 'noise':
        data = bytearray(draw(st.binary(max_size=200)))
    return CompressedImage(format=draw(NAMES), data=to_array(bytes(data)))


@st.composite
def odometries(draw):
    msg = Odometry(header=draw(HEADERS), child_frame_id=draw(NAMES))
    msg.pose.pose = draw(POSES)
    msg.twist.twist = Twist(linear=draw(VECTORS), angular=draw(VECTORS))
    return msg


PLACES = st.builds(Vector3, x=st.floats(0, 30), y=st.floats(-5, 5), z=st.just(0.0))


@st.composite
def trajectories(draw):
    if draw(st.booleans()):  # as our driver's, but for the numbers
        count, dt, vectors, repeats = 10, 200_000_000, PLACES, [1]
    else:
        count, dt = draw(st.sampled_from([0, 1, 2, 5, 10, 10])), draw(st.integers(1, 2**31))
        vectors, repeats = VECTORS, [1] * 20 + [0, 2]
    msg = MultiDOFJointTrajectory(header=draw(HEADERS))
    for index in range(count):
        place = Transform(translation=draw(vectors), rotation=Quaternion(w=1.0))
        transforms = [place] * draw(st.sampled_from(repeats))
        sec, nanosec = divmod((index + 1) * dt, 10**9)
        moment = Duration(sec=sec, nanosec=nanosec)
        if draw(st.integers(0, 40)) == 0:
            moment = Duration(sec=draw(st.integers(-(2**31), 2**31 - 1)))
        point = MultiDOFJointTrajectoryPoint(transforms=transforms, time_from_start=moment)
        msg.points.append(point)
    return msg


ROUTES = st.builds(
    Path, header=HEADERS, poses=st.lists(st.builds(PoseStamped, pose=POSES), max_size=12)
)
COMMANDS = st.builds(
    JointState,
    name=st.one_of(
        st.permutations(words.ACTUATORS).map(list), st.lists(st.sampled_from('ab'), max_size=4)
    ),
    position=st.one_of(
        st.lists(st.floats(0, 1), min_size=3, max_size=3), st.lists(WILD, max_size=4)
    ),
)
UNIT = st.one_of(st.floats(0, 1), MIXED)
ORDERS = st.builds(VehicleCommand, steer=UNIT, throttle=UNIT, brake=UNIT)


# ---- who takes it ----


def finite(*values) -> None:
    assert np.isfinite(np.asarray(values, float)).all(), values


def is_image(image, height, width) -> None:
    assert image.shape == (height, width, 3) and image.dtype == np.uint8


def take_picture(msg):
    is_image(images.image_from_msg(msg), msg.height, msg.width)


def take_compressed(msg):
    image = images.image_from_compressed(msg)
    is_image(image, *image.shape[:2])
    assert max(image.shape) <= images.MAX_SIDE


def take_views(msg):
    views = conversions.views_from_msg(msg)
    finite(views.time)
    assert views.image.shape[0] % len(views.names) == 0


def take_odometry(msgs):
    """A car's memory of its motion, and what the network is told of it."""
    history, route = EgoHistory(), RouteFollower(np.array([[0.0, 0.0], [100.0, 0.0]]))
    for msg in msgs:
        ego = history.add(conversions.seconds(msg.header.stamp), conversions.ego_from_msg(msg))
        finite(*dataclasses.astuple(ego)[:-1])
        finite(*proprio(ego, route.guidance(ego)))


def take_route(msg):
    route = RouteFollower(conversions.polyline_from_msg(msg))
    ego = conversions.ego_from_msg(Odometry())
    finite(*proprio(ego, route.guidance(ego)))


def take_trajectory(msg):
    trajectory = conversions.trajectory_from_msg(msg)
    sent = conversions.trajectory_to_msg(trajectory, msg.header.stamp, 'ego')
    for point in sent.points:
        finite(point.velocities[0].linear.x, point.transforms[0].rotation.z)
    command = TrajectoryTracker(METADRIVE).command(trajectory, 5.0)
    words.check_command(command)


def take_command(msg):
    words.check_command(words.command_from_joint_state(msg))


def give_command(given_command):
    """Every backend, with look-alikes of the packages that are not installed."""
    command, speed = given_command
    for name in ('sim', 'twist'):
        msg = words.open_backend(name, 'ego', METADRIVE).to_msg(command, speed, Time())
        if name == 'sim':
            finite(*msg.position)
        else:
            finite(msg.linear.x, msg.angular.z)
    for fill in (words.carla_control, _ackermann):
        msg = fill(lambda: SimpleNamespace(header=SimpleNamespace()), command, speed)
        finite(*(value for value in vars(msg).values() if isinstance(value, float)))


def _ackermann(kind, command, speed):
    return words.ackermann(kind, command, speed, METADRIVE, 0.6)


def take_order(msg):
    conversions.command_from_msg(msg)


class Said:
    """Takes the place of a publisher."""

    def publish(self, msg):
        if isinstance(msg, Odometry):
            pose, twist = msg.pose.pose, msg.twist.twist
            finite(pose.position.x, pose.position.y, twist.linear.x, twist.angular.z)
            conversions.ego_from_msg(msg)  # what we say we would believe


@contextlib.contextmanager
def a_carla_state():
    context = rclpy.Context()
    rclpy.init(context=context)
    node = CarlaStateNode(
        context=context,
        namespace='/mose',
        parameter_overrides=[
            Parameter('plan', value='path'),
            Parameter('autostart', value=False),
            Parameter('has_speedometer', value=False),
        ],
    )
    node.configure()
    node.state, node._odometry, node._path, node._asked = 'active', Said(), Said(), Said()
    yield node
    node.destroy_node()
    rclpy.try_shutdown(context=context)


def take_carla(node):
    hear = {
        NavSatFix: node._on_fix,
        Imu: node._on_imu,
        Float32: node._on_speed,
        Path: node._on_plan,
    }

    def take(msg):
        hear[type(msg)](msg)

    return take


CARLA = st.one_of(
    st.builds(NavSatFix, header=HEADERS, latitude=MIXED, longitude=MIXED),
    st.builds(
        Imu,
        header=HEADERS,
        orientation=TURNS,
        angular_velocity=VECTORS,
        linear_acceleration=VECTORS,
    ),
    st.builds(Float32, data=st.floats(width=32)),
    ROUTES,
)


class Straight:
    """A policy that goes straight on."""

    def reset(self):
        pass

    def plan(self, seen, scene):
        xy = np.stack([np.arange(1.0, 11.0), np.zeros(10)], 1)
        return Plan(trajectory=Trajectory(time=seen.time, dt=0.2, xy=xy))


NUMBERS = st.lists(WILD, max_size=8).map(np.array)
PIXELS = st.sampled_from(
    [np.zeros(shape, kind) for shape in [(4, 4, 4), (4, 4, 3), (0, 4, 4), (4,)] for kind in 'Bd']
)
TICKS = st.fixed_dictionaries(
    {},
    optional={
        'gnss': st.one_of(st.just(np.array([42.0, 2.0, 0.0])), NUMBERS),
        'imu': st.one_of(st.just(np.zeros(7)), NUMBERS),
        'speedometer': st.one_of(st.just({'speed': 3.0}), st.builds(dict, speed=WILD)),
        **{sensor_id(name): PIXELS for name in CAMERAS[:2]},
    },
)


def take_tick(ticks):
    route = RouteFollower(np.array([[0.0, 0.0], [100.0, 0.0]]))
    pilot = Pilot(Straight(), AgentConfig(warm_up_ticks=0), GeoFrame.at(42.0, 2.0), route)
    for index, data in enumerate(ticks):
        senses = Senses.read({name: (index, value) for name, value in data.items()})
        words.check_command(pilot.tick(0.05 * index, senses))


def take_global_plan(points):
    places = [SimpleNamespace(x=x, y=y) for x, y, *_ in points]
    world = [
        (SimpleNamespace(location=place, rotation=SimpleNamespace(yaw=point[2])), point[5])
        for place, point in zip(places, points, strict=True)
    ]
    gps = [({'lat': point[3], 'lon': point[4]}, point[5]) for point in points]
    frame, route = follow_plan(gps, world)
    finite(*dataclasses.astuple(frame))
    assert np.isfinite(route.points).all()


PLANS = st.lists(
    st.tuples(MIXED, MIXED, MIXED, MIXED, MIXED, st.integers(-5, 300)), min_size=0, max_size=6
)
VALUES = st.one_of(
    WILD,
    st.integers(-(2**63), 2**63 - 1),
    st.booleans(),
    st.text(max_size=20),
    st.lists(st.text(max_size=5), min_size=1, max_size=3),
)
KINDS = (ViewRouterParameters, DriverParameters, ControllerParameters)
FIELDS = [(kind, field.name) for kind in KINDS for field in dataclasses.fields(kind)]


@contextlib.contextmanager
def a_context():
    context = rclpy.Context()
    rclpy.init(context=context)
    yield context
    rclpy.try_shutdown(context=context)


def take_parameter(context):
    def take(setting):
        (kind, name), value = setting
        node = Node(
            'fuzzed',
            context=context,
            parameter_overrides=[Parameter(name, value=value)],
            start_parameter_services=False,
            enable_rosout=False,
        )
        try:
            read = getattr(declare(node, kind), name)
        finally:
            node.destroy_node()
        if isinstance(read, float):
            finite(read)

    return take


FRAGMENTS = ['/**/driver:', 'ros__parameters', ': {', '}', '[', ']', '&a ', '*a', '\n', '  ', '1']
FRAGMENTS += [
    'threads: 2\n',
    'plan_max_age_s: .nan\n',
    'bundle: x\n',
    '\t',
    '%',
    '\udcff',
    '[' * 999,
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(''.join)
TEXTS |= st.sampled_from(['threads: 3', '/**/driver: {ros__parameters: {threads: 2}}'])


def take_file(folder: File):
    path = folder / 'fuzzed.yaml'

    def take(text):
        path.write_bytes(text.encode(errors='surrogateescape'))
        refused = []
        for read in (check_params_file, AgentConfig.load):
            try:
                read(path)
            except ValueError as error:
                refused.append(error)
        if len(refused) == 2:
            raise refused[0]

    return take


BOUNDARIES = {  # what: messages, who takes them
    'picture': (pictures(), take_picture),
    'compressed picture': (compressed(), take_compressed),
    'views': (pictures(), take_views),
    'odometry': (st.lists(odometries(), min_size=1, max_size=3), take_odometry),
    'route': (ROUTES, take_route),
    'command': (
        st.builds(String, data=st.one_of(st.sampled_from(['LEFT', ' follow']), NAMES)),
        take_order,
    ),
    'trajectory': (trajectories(), take_trajectory),
    'vehicle command in': (COMMANDS, take_command),
    'vehicle command out': (st.tuples(ORDERS, MIXED), give_command),
    "CARLA's sensors and plan": (CARLA, a_carla_state),
    'ticks of the agent': (st.lists(TICKS, min_size=1, max_size=4), take_tick),
    'global plan of the agent': (PLANS, take_global_plan),
    'parameters': (st.tuples(st.sampled_from(FIELDS), VALUES), a_context),
    'parameters files': (TEXTS, take_file),
}


@contextlib.contextmanager
def headroom():
    """Let this process take no more than a little memory beyond what it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(File('/proc/self/statm').read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize('name', BOUNDARIES)
@pytest.mark.filterwarnings('error::RuntimeWarning')
def test_hostile_messages_are_answered_or_refused(name, tmp_path, pytestconfig):
    messages, take = BOUNDARIES[name]
    wanted = pytestconfig.getoption('messages')
    count = max(SHORT, math.ceil(wanted / len(BOUNDARIES)))
    answers = Counter()
    with contextlib.ExitStack() as stack:
        if take is a_carla_state:
            take = take_carla(stack.enter_context(a_carla_state()))
        elif take is a_context:
            take = take_parameter(stack.enter_context(a_context()))
        elif take is take_file:
            take = take_file(tmp_path)

        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=not wanted,
            suppress_health_check=ALL_CHECKS,
        )
        @given(messages)
        def send(msg):
            try:
                with headroom():
                    take(msg)
            except ValueError:
                answers['refused'] += 1
            else:
                answers['taken'] += 1

        send()
    print(f'\nfuzz: {name}: {answers["taken"]} taken, {answers["refused"]} refused')
    assert answers['taken'] and answers['refused'], answers

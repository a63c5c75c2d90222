"""Messages that make sense become core types and come back equal; those that don't are refused with a ValueError."""

import contextlib
import math

import cv2
import numpy as np
import pytest
from geometry_msgs.msg import Quaternion
from hypothesis import given, settings
from hypothesis import strategies as st
from nav_msgs.msg import Odometry, Path
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String
from trajectory_msgs.msg import MultiDOFJointTrajectory

from mose_ros.core import rig
from mose_ros.core.types import Command, EgoState, Plan, Trajectory, Views
from mose_ros.nodes import conversions, images, markers

STAMP = conversions.to_stamp(1_700_000_000.25)
ANY = st.floats(width=64, allow_nan=True, allow_infinity=True)


def picture(height=6, width=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def msg_of(image, encoding='rgb8', padding=0):
    codes = {
        'bgr8': cv2.COLOR_RGB2BGR,
        'bgra8': cv2.COLOR_RGB2BGRA,
        'rgba8': cv2.COLOR_RGB2RGBA,
        'mono8': cv2.COLOR_RGB2GRAY,
    }
    raw = image if encoding == 'rgb8' else cv2.cvtColor(image, codes[encoding])
    raw = raw.reshape(image.shape[0], -1)
    raw = np.pad(raw, [(0, 0), (0, padding)])
    msg = Image(height=image.shape[0], width=image.shape[1], encoding=encoding, step=raw.shape[1])
    msg.data.frombytes(raw.tobytes())
    return msg


@pytest.mark.parametrize('encoding', ['rgb8', 'bgr8', 'rgba8', 'bgra8'])
@pytest.mark.parametrize('padding', [0, 3])
def test_pictures_of_all_encodings_become_rgb(encoding, padding):
    image = picture()
    assert (images.image_from_msg(msg_of(image, encoding, padding)) == image).all()
    assert (images.image_from_msg(msg_of(picture(seed=1), encoding, padding)) != image).any()


def test_grey_pictures_become_rgb():
    read = images.image_from_msg(msg_of(picture(), 'mono8'))
    assert read.shape == (6, 5, 3) and (read[..., 0] == read[..., 2]).all()


def test_a_picture_comes_back_as_it_was_sent():
    image = picture()
    msg = images.image_to_msg(image, STAMP, 'front')
    assert msg.header.frame_id == 'front' and msg.step == 15
    assert (images.image_from_msg(msg) == image).all()
    assert (
        images.image_from_msg(images.image_to_msg(image[:, ::-1], STAMP, '')) == image[:, ::-1]
    ).all()


@pytest.mark.parametrize(
    ('change', 'word'),
    [
        ({'encoding': '16UC1'}, 'encoding'),
        ({'step': 14}, 'step'),
        ({'height': 7}, 'truncated'),
        ({'height': 5}, 'more than'),
        ({'width': 0}, '0x6'),
        ({'height': 0}, '5x0'),
        ({'width': 2**31}, 'picture of'),
        ({'step': 2**32 - 1}, 'truncated'),
    ],
)
def test_broken_pictures_are_refused(change, word):
    msg = msg_of(picture())
    for name, value in change.items():
        setattr(msg, name, value)
    with pytest.raises(ValueError, match=word):
        images.image_from_msg(msg)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(['rgb8', 'bgra8', 'mono8', '', 'bayer']),
    st.binary(max_size=200),
)
def test_no_picture_message_does_more_than_be_refused(height, width, step, encoding, data):
    msg = Image(height=height, width=width, step=step, encoding=encoding)
    msg.data.frombytes(data)
    with contextlib.suppress(ValueError):
        assert images.image_from_msg(msg).shape == (height, width, 3)


def test_compressed_pictures_are_decoded_and_damaged_ones_refused():
    image = cv2.resize(picture(), (64, 48))
    data = cv2.imencode('.png', cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
    msg = CompressedImage(format='png')
    msg.data.frombytes(data)
    assert (images.image_from_compressed(msg) == image).all()
    for damaged in (b'', b'no picture', data[: len(data) // 3]):
        broken = CompressedImage(format='png')
        broken.data.frombytes(damaged)
        with pytest.raises(ValueError, match='picture'):
            images.image_from_compressed(broken)


def test_compressed_pictures_are_whole_and_of_the_size_that_they_claim():
    def read(data):
        msg = CompressedImage(format='jpeg')
        msg.data.frombytes(data)
        return images.image_from_compressed(msg)

    jpeg = cv2.imencode('.jpg', cv2.resize(picture(), (64, 48)))[1].tobytes()
    assert read(jpeg).shape == read(jpeg + bytes(999)).shape == (48, 64, 3)  # drivers pad
    with pytest.raises(ValueError, match='truncated'):
        read(jpeg[:-200])
    at = jpeg.index(b'\xff\xc0') + 5
    with pytest.raises(ValueError, match='65535x65535'):
        read(jpeg[:at] + b'\xff' * 4 + jpeg[at + 4 :])
    bitmap = cv2.imencode('.bmp', picture())[1].tobytes()
    with pytest.raises(ValueError, match='no JPEG or PNG'):
        read(bitmap)


@given(st.floats(0, 2e9))
def test_stamps_keep_the_time(time):
    assert conversions.seconds(conversions.to_stamp(time)) == pytest.approx(time, abs=1e-6)


def test_odometry_keeps_pose_and_motion():
    ego = EgoState(x=1.0, y=-2.0, yaw=2.5, speed=-0.5, yaw_rate=0.1)
    read = conversions.ego_from_msg(conversions.ego_to_msg(ego, STAMP, 'map', 'ego_vehicle'))
    assert (read.x, read.y, read.speed, read.yaw_rate) == (1.0, -2.0, -0.5, 0.1)
    assert read.yaw == pytest.approx(2.5)
    turned = conversions.ego_to_msg(
        EgoState(x=1.0, y=-2.0, yaw=-2.5, speed=0.0), STAMP, 'map', 'e'
    )
    assert conversions.ego_from_msg(turned).yaw == pytest.approx(-2.5)


def test_quaternions_are_normalised():
    assert conversions.yaw_of(Quaternion(z=3.0, w=3.0)) == pytest.approx(math.pi / 2)
    with pytest.raises(ValueError, match='no quaternion'):
        conversions.yaw_of(Quaternion(z=0.0, w=0.0))


@given(st.tuples(ANY, ANY, ANY, ANY, ANY, ANY))
def test_only_finite_odometry_passes(values):
    msg = Odometry()
    pose, twist = msg.pose.pose, msg.twist.twist
    pose.position.x, pose.position.y, pose.orientation.z, pose.orientation.w = values[:4]
    twist.linear.x, twist.angular.z = values[4:]
    try:
        ego = conversions.ego_from_msg(msg)
    except ValueError:
        return
    assert np.isfinite([ego.x, ego.y, ego.yaw, ego.speed, ego.yaw_rate]).all()


def test_routes_keep_their_points():
    points = np.array([[0.0, 0.0], [1.0, 2.0], [5.0, 2.0]])
    msg = conversions.polyline_to_msg(points, STAMP, 'map')
    assert (conversions.polyline_from_msg(msg) == points).all()
    assert conversions.yaw_of(msg.poses[0].pose.orientation) == pytest.approx(math.atan2(2, 1))
    assert conversions.polyline_from_msg(Path()).shape == (0, 2)


def test_commands_are_the_known_ones():
    assert conversions.command_from_msg(String(data=' Lane_Left ')) is Command.LANE_LEFT
    with pytest.raises(ValueError, match='lane_right'):
        conversions.command_from_msg(String(data='fly'))


def test_views_keep_names_and_picture():
    views = Views(time=1.5, names=('front', 'back'), image=picture(8, 4), weights={'front': 1.0})
    read = conversions.views_from_msg(conversions.views_to_msg(views, conversions.to_stamp(1.5)))
    assert read.names == views.names and read.time == 1.5 and (read.image == views.image).all()
    weights = conversions.weights_to_msg(views)
    assert [dim.label for dim in weights.layout.dim] == ['front'] and list(weights.data) == [1.0]


@pytest.mark.parametrize('names', ['', 'front,', 'front,front', 'front,back,left'])
def test_views_with_wrong_names_are_refused(names):
    msg = images.image_to_msg(picture(8, 4), STAMP, names)
    with pytest.raises(ValueError, match='views'):
        conversions.views_from_msg(msg)


def a_trajectory(time=10.0):
    return Trajectory(time=time, dt=0.2, xy=np.array([[1.0, 0.0], [2.0, 0.1], [3.0, 0.4]]))


def test_trajectories_keep_points_and_times():
    sent = a_trajectory()
    msg = conversions.trajectory_to_msg(sent, conversions.to_stamp(10.0), 'ego_vehicle')
    read = conversions.trajectory_from_msg(msg)
    assert read.dt == pytest.approx(0.2) and read.time == 10.0
    assert np.allclose(read.xy, sent.xy) and not np.allclose(read.xy, sent.xy + 0.01)
    assert msg.points[0].velocities[0].linear.x == pytest.approx(5.0)
    assert msg.joint_names == ['ego_vehicle']


def test_a_path_has_the_time_of_each_pose():
    msg = conversions.trajectory_to_path(a_trajectory(), conversions.to_stamp(10.0), 'ego_vehicle')
    assert [conversions.seconds(p.header.stamp) for p in msg.poses] == pytest.approx(
        [10.2, 10.4, 10.6]
    )


def test_trajectories_that_are_not_finite_are_neither_sent_nor_read():
    bad = Trajectory(time=0.0, dt=0.2, xy=np.array([[1.0, np.nan], [2.0, 0.0]]))
    with pytest.raises(ValueError, match='not finite'):
        conversions.trajectory_to_msg(bad, STAMP, 'ego_vehicle')
    msg = conversions.trajectory_to_msg(a_trajectory(), STAMP, 'ego_vehicle')
    msg.points[1].transforms[0].translation.y = math.inf
    with pytest.raises(ValueError, match='not finite'):
        conversions.trajectory_from_msg(msg)


def test_trajectories_of_the_wrong_form_are_refused():
    with pytest.raises(ValueError, match='points'):
        conversions.trajectory_from_msg(MultiDOFJointTrajectory())
    uneven = conversions.trajectory_to_msg(a_trajectory(), STAMP, 'ego_vehicle')
    uneven.points[1].time_from_start = uneven.points[0].time_from_start
    with pytest.raises(ValueError, match='equal steps'):
        conversions.trajectory_from_msg(uneven)
    two = conversions.trajectory_to_msg(a_trajectory(), STAMP, 'ego_vehicle')
    two.points[0].transforms *= 2
    with pytest.raises(ValueError, match='one transform'):
        conversions.trajectory_from_msg(two)


def test_skills_and_markers_tell_the_plan():
    chain = {'perception': 'vehicle', 'prediction': 'cut_in', 'planning': 'give_way'}
    plan = Plan(trajectory=a_trajectory(), skills=chain)
    assert conversions.skills_to_msg(plan).data == 'vehicle > cut_in > give_way'
    band, text = markers.plan_to_msg(plan, 'a car', STAMP, 'ego_vehicle').markers
    assert len(band.points) == 4 and text.text == 'vehicle > cut_in > give_way\na car'


def test_camera_info_is_the_pinhole_of_the_rig():
    msg = images.camera_info_to_msg(rig.camera('front'), 256, 144, STAMP, 'ego_vehicle/front')
    assert msg.k[0] == pytest.approx(128 / math.tan(math.radians(35))) and msg.k[2] == 128

"""CARLA's numbers in our conventions, against the types, the transforms and the map of the real carla wheel."""

import math
from enum import IntEnum

import numpy as np
import pytest

from mose_ros.core import carla as words
from mose_ros.core.rig import CAMERAS, RIG
from mose_ros.core.types import COMMANDS, Command

REASON = 'the carla wheel is not installed: pip install carla==0.9.16'
ROAD = """<?xml version="1.0"?>
<OpenDRIVE>
  <header revMajor="1" revMinor="4" name="bend" version="1">
    <geoReference><![CDATA[+proj=tmerc +lat_0=49 +lon_0=8 +k=1 +x_0=0 +y_0=0 +datum=WGS84]]></geoReference>
  </header>
  <road name="bend" length="100" id="1" junction="-1">
    <link/>
    <planView><geometry s="0" x="0" y="0" hdg="0" length="100"><line/></geometry></planView>
    <lanes><laneSection s="0">
      <left><lane id="1" type="driving"><width sOffset="0" a="3.5" b="0" c="0" d="0"/></lane></left>
      <center><lane id="0" type="none"/></center>
      <right><lane id="-1" type="driving"><width sOffset="0" a="3.5" b="0" c="0" d="0"/></lane></right>
    </laneSection></lanes>
  </road>
</OpenDRIVE>"""


def leaderboard_fix(x, y, latitude=42.0, longitude=2.0):
    """Return latitude and longitude of a CARLA place by the Leaderboard's formula, in the direction it is written there."""
    scale = math.cos(math.radians(latitude))
    mx = scale * math.radians(longitude) * 6378137.0 + x
    my = scale * 6378137.0 * math.log(math.tan((90.0 + latitude) * math.pi / 360.0)) - y
    lon = math.degrees(mx / (6378137.0 * scale))
    return 360.0 * math.atan(math.exp(my / (6378137.0 * scale))) / math.pi - 90.0, lon


# ---- frames and commands ----


def test_a_place_behind_carlas_transform_is_behind_ours():
    carla = pytest.importorskip('carla', reason=REASON)
    for yaw in (-170.0, -90.0, 0.0, 35.0, 120.0, 180.0):
        there = carla.Transform(carla.Location(3.0, -7.0, 0.5), carla.Rotation(yaw=yaw))
        x, y, ours = words.pose(there.location.x, there.location.y, there.rotation.yaw)
        for ahead, left in ((5.0, 0.0), (2.0, 1.5)):
            point = there.transform(carla.Location(ahead, -left, 0.0))  # CARLA's y is to the right
            expected = (
                x + ahead * math.cos(ours) - left * math.sin(ours),
                y + ahead * math.sin(ours) + left * math.cos(ours),
            )
            assert (point.x, -point.y) == pytest.approx(expected, abs=1e-4)
            assert left == 0 or (point.x, point.y) != pytest.approx(expected, abs=0.1)


def test_the_compass_points_north_and_turns_clockwise():
    assert words.compass_yaw(0.0) == pytest.approx(math.pi / 2)  # -y of CARLA is our +y
    assert words.compass_yaw(math.pi / 2) == pytest.approx(0.0)
    assert words.compass_yaw(math.pi) == pytest.approx(-math.pi / 2)


def test_road_options_are_commands():
    class RoadOption(IntEnum):
        VOID, LEFT, RIGHT, STRAIGHT, LANEFOLLOW, CHANGELANELEFT, CHANGELANERIGHT = -1, *range(1, 7)

    assert [words.command(one) for one in range(1, 7)] == list(COMMANDS)
    assert words.command(RoadOption.CHANGELANERIGHT) is Command.LANE_RIGHT
    assert words.command(RoadOption.RIGHT) is Command.RIGHT
    assert words.command(RoadOption.VOID) is Command.FOLLOW is words.command(99)


# ---- the rig ----


def test_agent_and_bridge_ask_for_the_same_rig_on_opposite_hands():
    agent = {one['id']: one for one in words.sensors() if 'camera' in one['type']}
    [ego] = words.objects(role='hero')['objects']
    bridge = {one['id']: one for one in ego['sensors'] if 'camera' in one['type']}
    assert ego['id'] == 'hero'
    assert list(agent) == list(bridge) == [f'rgb_{name}' for name in CAMERAS]
    for camera in RIG:
        left, right = bridge[f'rgb_{camera.name}'], agent[f'rgb_{camera.name}']
        mount = left['spawn_point']
        assert (mount['x'], mount['z']) == (right['x'], right['z']) == (camera.x, camera.z)
        assert mount['y'] == -right['y'] == camera.y
        assert math.radians(mount['yaw']) == pytest.approx(camera.yaw)
        assert abs(mount['yaw'] + right['yaw']) in (0.0, 360.0)
        assert left['fov'] == right['fov'] == pytest.approx(math.degrees(camera.fov))
        assert (
            math.dist((0, 0, 0), (mount['x'], mount['y'], mount['z'])) < 3.0
        )  # Leaderboard's limit
    assert agent['rgb_front_left']['y'] == -0.55 and agent['rgb_front_left']['yaw'] == -55.0


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(ValueError, match='1600x0'):
        words.objects(height=0)


# ---- the globe ----


def test_the_leaderboards_fixes_come_back_as_places():
    frame = words.GeoFrame.at(42.0, 2.0)
    for x, y in ((0.0, 0.0), (250.0, -80.0), (-900.0, 1500.0)):
        assert frame.point(*leaderboard_fix(x, y)) == pytest.approx((x, -y), abs=1e-6)


def test_a_route_tells_its_frame_whatever_the_origin():
    places = np.array([[10.0, -5.0], [80.0, 40.0], [200.0, 300.0]])
    fixes = np.array([leaderboard_fix(x, y, latitude=0.0, longitude=-3.0) for x, y in places])
    frame = words.GeoFrame.fit(fixes, places * (1, -1))
    assert frame.point(*leaderboard_fix(-400.0, 90.0, 0.0, -3.0)) == pytest.approx((-400, -90))
    assert frame.y_scale > 0


def test_a_straight_route_borrows_the_scale_of_its_other_axis():
    places = np.array([[10.0, 7.0], [80.0, 7.0], [200.0, 7.0]])
    fixes = np.array([leaderboard_fix(x, y) for x, y in places])
    frame = words.GeoFrame.fit(fixes, places * (1, -1))
    assert frame.point(*leaderboard_fix(100.0, 60.0)) == pytest.approx((100.0, -60.0), abs=1e-3)
    with pytest.raises(ValueError, match='tells no scale'):
        words.GeoFrame.fit(fixes, places * (0.01, -0.01))
    with pytest.raises(ValueError, match='do not move as its places do'):
        words.GeoFrame.fit(np.repeat(fixes[:1], len(fixes), axis=0), places)
    with pytest.raises(ValueError, match='no place on Earth'):
        words.GeoFrame.fit(fixes, places * 1e9)


@pytest.mark.parametrize('mirrored', [False, True])
def test_a_nearly_straight_route_tells_a_mirrored_map(mirrored):
    known = words.GeoFrame.at(42.0, 2.0, mirrored=mirrored)

    def fix(x, y):
        return leaderboard_fix(x, y if mirrored else -y)

    bent = np.array([[10.0, 0.0], [80.0, 2.0], [200.0, 5.0]])  # 5 m across
    frame = words.GeoFrame.fit(np.array([fix(x, y) for x, y in bent]), bent)
    assert frame.y_scale == pytest.approx(known.y_scale, rel=1e-4)
    assert frame.point(*fix(100.0, 60.0)) == pytest.approx((100.0, 60.0), abs=0.05)
    straight = bent * (1, 0)  # nothing tells the side, so it is CARLA's usual one
    frame = words.GeoFrame.fit(np.array([fix(x, y) for x, y in straight]), straight)
    assert frame.y_scale == pytest.approx(abs(known.y_scale), rel=1e-4)


def test_fixes_of_the_real_map_come_back_as_places():
    carla = pytest.importorskip('carla', reason=REASON)
    road = carla.Map('road', ROAD)
    places = [(0.0, 0.0), (90.0, -40.0), (300.0, 200.0), (-500.0, 900.0)]

    def fix(x, y):
        found = road.transform_to_geolocation(carla.Location(x, y, 0.0))
        return found.latitude, found.longitude

    fixes = np.array([fix(x, y) for x, y in places])
    frame = words.GeoFrame.fit(fixes, np.array(places) * (1, -1))
    for x, y in (*places, (120.0, 77.0)):
        assert frame.point(*fix(x, y)) == pytest.approx((x, -y), abs=0.5)
    mirrored = fixes[-1, 0] > fixes[0, 0]  # 0.9.16: the latitude grows with CARLA's y
    assert (frame.y_scale < 0) == mirrored
    known = words.GeoFrame.at(49.0, 8.0, mirrored=bool(mirrored))
    assert known.point(*fix(300.0, 200.0)) == pytest.approx((300.0, -200.0), abs=0.5)


# ---- where the vehicle is ----


def drive(localizer, seconds, noise, has_speedometer, curve=0.1, hz=20):
    """Drive a circle with noisy fixes; return how far off place and speed are in the second half."""
    random, state = np.random.default_rng(0), np.zeros(3)
    off_place, off_speed = [], []
    for tick in range(int(seconds * hz)):
        speed = min(6.0, tick / hz)
        yaw_rate = curve * speed
        state += np.array([speed * np.cos(state[2]), speed * np.sin(state[2]), yaw_rate]) / hz
        antenna = state[:2] + words.ANTENNA_X * np.array([np.cos(state[2]), np.sin(state[2])])
        found = localizer.update(
            tick / hz,
            fix=antenna + random.normal(0.0, noise, 2),
            yaw=words.wrap(state[2]),
            yaw_rate=yaw_rate,
            speed=speed if has_speedometer else None,
            acceleration=1.0 if speed < 6.0 else 0.0,
        )
        if tick > 0.5 * seconds * hz:
            off_place.append(np.hypot(found.x - state[0], found.y - state[1]))
            off_speed.append(abs(found.speed - speed))
    return np.mean(off_place), np.mean(off_speed)


def test_noise_of_half_a_metre_is_filtered_out():
    place, speed = drive(words.Localizer(), 20.0, 0.55, True)
    assert place < 0.2 and speed == 0.0
    raw, _ = drive(words.Localizer(gain=1.0), 20.0, 0.55, True)
    assert raw > 0.5  # the fixes alone


def test_without_a_speedometer_the_fixes_tell_the_speed():
    place, speed = drive(words.Localizer(gain=0.5, speed_gain=0.2), 20.0, 0.0, False)
    assert place < 0.2 and speed < 0.2


def test_a_compass_that_fails_leaves_the_gyroscope():
    localizer = words.Localizer()
    localizer.update(0.0, fix=np.array([-1.4, 0.0]), yaw=0.0, yaw_rate=0.0, speed=0.0)
    for tick in range(1, 21):
        state = localizer.update(0.05 * tick, fix=None, yaw=math.nan, yaw_rate=0.5, speed=math.nan)
    assert state.yaw == pytest.approx(0.5) and (state.x, state.y) == pytest.approx((0.0, 0.0))


def test_one_fix_that_jumps_is_not_believed_and_a_vehicle_set_down_elsewhere_is_found():
    localizer = words.Localizer()

    def stand(time, x):
        fix = np.array([x + words.ANTENNA_X, 0.0])
        return localizer.update(time, fix=fix, yaw=0.0, yaw_rate=0.0, speed=0.0).x

    assert stand(0.0, 5.0) == pytest.approx(5.0)
    assert stand(0.05, 1e7) == pytest.approx(5.0)
    assert [stand(0.1 + 0.05 * tick, 400.0) for tick in range(12)][-1] == pytest.approx(400.0)


def test_time_that_goes_back_begins_anew():
    localizer = words.Localizer()
    localizer.update(5.0, fix=np.array([98.6, 0.0]), yaw=0.0, yaw_rate=0.0, speed=1.0)
    assert localizer.is_placed
    state = localizer.update(1.0, fix=np.array([-1.4, 0.0]), yaw=0.0, yaw_rate=0.0, speed=1.0)
    assert state.x == pytest.approx(0.0)

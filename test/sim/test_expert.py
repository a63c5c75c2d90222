"""The expert on drawn scenes: one straight road, one thing in the way, and what a good driver plans."""

from dataclasses import replace

import numpy as np
import pytest

from mose_ros.core.types import Actor, Command, Corridor, EgoState, Guidance, Scene
from mose_ros.sim.expert import Expert
from mose_ros.sim.frenet import Frenet

LIMIT, LANE = 8.5, 3.5


def corridor(length=120, bend=0.0, left=LANE * 1.5, right=LANE / 2, command=Command.FOLLOW):
    """Return a lane along x from -10, with an opposing lane to its left; `bend` is its curvature."""
    s = np.arange(-10.0, length)
    heading = bend * np.maximum(s, 0.0)
    xy = np.stack([np.cumsum(np.cos(heading)) - 11.0, np.cumsum(np.sin(heading))], axis=1)
    full = np.ones(len(s))
    return Corridor(
        xy=xy,
        left=left * full,
        right=right * full,
        own_left=LANE / 2 * full,
        lane_width=LANE * full,
        junction=np.zeros(len(s), bool),
        speed_limit=LIMIT * full,
        commands=(command,) * len(s),
    )


def scene(*actors, way=None, x=0.0, y=0.0, yaw=0.0, speed=8.0, **ego):
    """Return a scene with the ego near the start of the corridor."""
    guidance = Guidance(near=np.array([10.0, 0]), far=np.array([25.0, 0]), command=Command.FOLLOW)
    return Scene(
        time=3.0,
        ego=EgoState(x=x, y=y, yaw=yaw, speed=speed, **ego),
        actors=actors,
        corridor=way or corridor(),
        progress=x + 10.0,
        guidance=guidance,
    )


def car(x, y=0.0, speed=0.0, yaw=0.0, type_id='vehicle.car', **rest):
    velocity = (float(speed * np.cos(yaw)), float(speed * np.sin(yaw)))
    size = (4.5, 1.85, 1.5)
    values = {'id': 'car', 'kind': 'vehicle', 'type_id': type_id, 'velocity': velocity, **rest}
    return Actor(x=float(x), y=float(y), yaw=float(yaw), size=size, **values)


def walker(x, y, velocity):
    return Actor(
        id='walker',
        kind='walker',
        type_id='walker.pedestrian',
        x=float(x),
        y=float(y),
        yaw=float(np.arctan2(*velocity[::-1])),
        size=(0.5, 0.5, 1.75),
        velocity=velocity,
    )


def sign(kind, distance, state=''):
    type_id = {'traffic_light': 'traffic.traffic_light', 'traffic_sign': 'traffic.stop'}[kind]
    return Actor(
        id='sign',
        kind=kind,
        type_id=type_id,
        x=distance + 2.3,
        y=-3.0,
        yaw=float(np.pi),
        size=(0.5, 0.5, 3.0),
        state=state,
        affects_ego=True,
        stop_distance=distance,
    )


def solve(moment, forecast=None):
    """Return the expert's points, the speeds between them, and its reason."""
    expert = Expert(forecast)
    plan = expert.plan(None, moment)
    assert plan.trajectory.xy.shape == (15, 2)
    assert plan.trajectory.time == moment.time
    return plan.trajectory.xy, plan.trajectory.speeds(), expert.reason


def test_a_free_road_is_driven_at_the_limit():
    xy, speeds, reason = solve(scene())
    assert speeds[-1] == pytest.approx(LIMIT, abs=0.3)
    assert np.abs(xy[:, 1]).max() < 0.05
    assert reason.cause == 'free'


def test_it_slows_down_for_a_bend():
    _, straight, _ = solve(scene(speed=5.0))
    _, bent, _ = solve(scene(way=corridor(bend=1 / 10), speed=5.0))
    assert bent.max() ** 2 / 10 < 2.5
    assert straight.max() > 7.0


def test_it_follows_a_slower_lead_and_stops_behind_a_standing_one():
    _, speeds, reason = solve(scene(car(16, speed=5.0)))
    assert 4.0 < speeds[-1] < 6.5
    assert (reason.cause, reason.actor_id) == ('lead', 'car')
    xy, speeds, _ = solve(scene(car(18, state='braking')))
    assert xy[-1, 0] + 2.26 < 18 - 2.25
    assert speeds[-1] < 1.0


def test_red_light_and_stop_sign_stop_it_before_the_line():
    for thing in (sign('traffic_light', 14.0, 'red'), sign('traffic_sign', 14.0)):
        xy, speeds, reason = solve(scene(thing, speed=7.0))
        assert 11.0 < xy[-1, 0] < 13.3  # stop_distance counts from the front bumper
        assert speeds[-1] < 2.0 < speeds[0]
        assert reason.cause in ('light', 'stop_sign')
    _, speeds, _ = solve(scene(sign('traffic_light', 14.0, 'green'), speed=7.0))
    assert speeds[-1] > 7.0


def test_yellow_stops_who_can_and_lets_go_who_can_not():
    _, far, _ = solve(scene(sign('traffic_light', 20.0, 'yellow')))
    _, near, _ = solve(scene(sign('traffic_light', 6.0, 'yellow')))
    assert far[-1] < 4.0
    assert near[-1] > 7.5


def test_a_stop_sign_is_left_after_the_stop():
    waits = scene(sign('traffic_sign', 1.0), speed=0.0, since_stop=30.0)
    stood = scene(sign('traffic_sign', 1.0), speed=0.0, since_stop=0.0)
    assert solve(waits)[0][-1, 0] < 1.0
    assert solve(stood)[0][-1, 0] > 4.0


def test_it_passes_a_parked_car_when_nobody_comes():
    parked = car(25, -0.3, type_id='vehicle.parked', id='parked')
    xy, _, reason = solve(scene(parked))
    assert xy[-1, 1] > 1.5
    assert reason.actor_id == 'parked'
    oncoming = car(45, LANE, speed=8.0, yaw=np.pi, id='oncoming')
    xy, speeds, _ = solve(scene(parked, oncoming))
    assert np.abs(xy[:, 1]).max() < 0.9
    assert speeds[-1] < 4.0


def test_it_knows_what_actors_will_do():
    standing = walker(15, -4.0, (0.0, 0.0))
    steps_out = {'walker': np.stack([np.full(39, 15.0), -4.0 + 0.3 * np.arange(1, 40)], 1)}
    _, careless, _ = solve(scene(standing))
    xy, careful, reason = solve(scene(standing), lambda horizon, dt: steps_out)
    assert careless[-1] > 7.0
    assert xy[-1, 0] < 13.0 or np.abs(xy[:, 1]).max() > 0.5
    assert careful[-1] < 6.0
    assert reason.actor_id == 'walker'


def test_it_brakes_hard_when_it_must():
    _, speeds, reason = solve(scene(walker(13.0, -1.5, (0.0, 0.6))))
    assert (8.0 - speeds[4]) / 0.9 > 3.0
    assert reason.cause == 'crossing'


def test_it_waits_for_a_gap_in_crossing_traffic():
    crosses = car(20, -18, speed=7.0, yaw=np.pi / 2)
    xy, speeds, reason = solve(scene(crosses, speed=6.0))
    assert xy[-1, 0] < 20 - 2.26 - 0.9
    assert reason.cause == 'gap'
    leaves = car(20, 6, speed=7.0, yaw=np.pi / 2)
    assert solve(scene(leaves, speed=6.0))[1][-1] > 6.0


def test_it_makes_way_for_an_emergency_vehicle():
    siren = car(-25, speed=12.0, type_id='vehicle.emergency', state='siren', id='siren')
    xy, speeds, reason = solve(scene(siren, way=corridor(right=2.5)))
    assert speeds[-1] < 4.0
    assert xy[-1, 1] < -0.2
    assert (reason.cause, reason.actor_id) == ('emergency_vehicle', 'siren')
    ahead = car(40, LANE, speed=12.0, type_id='vehicle.emergency', state='siren', id='siren')
    assert solve(scene(ahead))[1][-1] > 7.5


def test_a_lane_change_waits_for_who_is_beside():
    way = corridor(left=LANE / 2, right=LANE * 1.5, command=Command.LANE_LEFT)
    free, _, _ = solve(scene(way=way, y=-LANE))
    taken, _, _ = solve(scene(car(-1.0, 0.0, speed=8.0), way=way, y=-LANE))
    assert free[-1, 1] > 2.0
    assert taken[5, 1] < 0.3


@pytest.mark.parametrize('y, yaw, speed', [(1.0, 0.0, 8.0), (-1.0, 0.26, 6.0), (0.5, 0.26, 9.5)])
def test_from_a_disturbed_state_it_comes_back(y, yaw, speed):
    moment = scene(y=y, yaw=yaw, speed=speed)
    points = solve(moment)[0]
    cos, sin = np.cos(yaw), np.sin(yaw)
    world = points @ np.array([[cos, sin], [-sin, cos]]) + (0.0, y)
    assert abs(world[-1, 1]) < max(0.3 * abs(y), 0.45)
    assert np.abs(points[0, 1]) < 0.1  # it starts along the vehicle


def test_it_leaves_a_parking_place():
    way = corridor(right=LANE / 2 + 2.4, command=Command.LANE_LEFT)
    first = car(7.5, -2.85, type_id='vehicle.parked', id='parked1')
    behind = car(-7.0, -2.85, type_id='vehicle.parked', id='parked2')
    xy, _, _ = solve(scene(first, behind, way=way, y=-2.85, speed=0.0))
    assert xy[-1, 1] > 1.0
    passing = car(-14.0, speed=8.0)
    xy, _, _ = solve(scene(first, behind, passing, way=way, y=-2.85, speed=0.0))
    assert xy[9, 1] < 0.5


def test_same_moment_same_plan_whatever_was_before():
    expert, moment = Expert(), scene(car(30, speed=2.0))
    first = expert.plan(None, moment).trajectory.xy
    expert.plan(None, scene(sign('traffic_light', 9.0, 'red')))
    np.testing.assert_array_equal(expert.plan(None, moment).trajectory.xy, first)
    moved = replace(moment, ego=replace(moment.ego, speed=5.0))
    assert not np.array_equal(expert.plan(None, moved).trajectory.xy, first)


def test_the_road_as_coordinates_and_back():
    road = Frenet(corridor(bend=1 / 30))
    points = np.random.default_rng(0).uniform((15, -3), (60, 3), (50, 2))
    x, y, _ = road.world(points[:, 0], points[:, 1])
    s, d = road.project(np.stack([x, y], axis=1))
    np.testing.assert_allclose(np.stack([s, d], axis=1), points, atol=0.12)
    with pytest.raises(ValueError, match='two points'):
        Frenet(corridor(length=-9))

"""What drivers remember of odometry and route."""

import numpy as np
import pytest

from mose_ros.core.navigation import (
    EgoHistory,
    RouteFollower,
    check_guidance,
    coast,
    smooth,
    to_ego,
)
from mose_ros.core.types import FAR_M, NEAR_M, Command, EgoState


def ego(x=0.0, y=0.0, yaw=0.0, speed=0.0):
    return EgoState(x=x, y=y, yaw=yaw, speed=speed)


def test_history_answers_with_the_nearest_moment_or_not_at_all():
    history = EgoHistory()
    for step in range(10):
        history.add(0.1 * step, ego(x=float(step), speed=5.0))
    assert history.at(0.52, 0.05).x == 5
    assert history.at(0.58, 0.05).x == 6
    assert history.at(2.0, 0.05) is None


def test_since_stop_counts_from_the_last_standstill_only():
    history, time = EgoHistory(), 0.0
    speeds = [5.0] * 5 + [0.0] * 4 + [2.0] * 5
    states = []
    for speed in speeds:
        states.append(history.add(time, ego(speed=speed)))
        time += 0.1
    assert states[0].since_stop == 100.0 and states[4].since_stop == pytest.approx(102.0)
    assert states[6].since_stop > 100  # standing for a moment is no standstill yet
    assert states[8].since_stop == 0.0
    assert states[-1].since_stop == pytest.approx(5 * 0.2)


def test_a_car_found_standing_has_just_stopped():
    assert EgoHistory().add(0.0, ego(speed=0.0)).since_stop == 0.0


def test_acceleration_is_smooth_and_right_in_the_end():
    history = EgoHistory()
    states = [history.add(0.1 * k, ego(speed=0.2 * k)) for k in range(20)]
    assert 0 < states[1].acceleration < 2.0
    assert states[-1].acceleration == pytest.approx(2.0, abs=0.01)


def test_time_that_goes_back_forgets():
    history = EgoHistory()
    history.add(10.0, ego(speed=5.0))
    history.add(5.0, ego(speed=0.0))
    assert history.at(10.0, 0.1) is None and history.newest[0] == 5.0


def test_guidance_looks_along_the_route_in_the_frame_of_the_ego():
    route = RouteFollower(np.array([[0.0, 0.0], [0.0, 20.0], [100.0, 20.0]]))
    said = route.guidance(ego(x=1.0, y=5.0, yaw=np.pi / 2), Command.RIGHT)
    assert said.near == pytest.approx([NEAR_M, 1.0])  # the route is a metre to the left
    assert said.far == pytest.approx([15.0, 1.0 - (FAR_M - 15.0)])  # round the corner to the right
    assert said.command is Command.RIGHT


def test_a_route_goes_straight_on_beyond_its_end():
    route = RouteFollower(np.array([[0.0, 0.0], [10.0, 0.0]]))
    assert route.guidance(ego(x=8.0), Command.FOLLOW).far == pytest.approx([25.0, 0.0])


def test_ways_that_cross_are_kept_apart():
    angle = np.linspace(0, 1.75 * np.pi, 200)
    loop = np.stack([50 * np.sin(angle), 50 - 50 * np.cos(angle)], 1)
    route = RouteFollower(np.vstack([[[-50.0, 0.0]], loop, [[0.0, -60.0]]]))
    route.project(-50.0, 0.0)
    for x in np.arange(-50.0, 1.0, 5.0):
        progress = route.project(x, 0.0)
    assert progress == pytest.approx(50.0, abs=1.0)


def test_who_begins_on_a_round_begins_at_its_first_pass():
    """Start and end of a round are one place, and a route of several rounds passes each place as often."""
    angle = np.linspace(0, 6 * np.pi, 607)  # three rounds whose points do not coincide
    route = RouteFollower(np.stack([100 * np.sin(angle), 100 - 100 * np.cos(angle)], 1))
    assert route.project(0.0, 0.0) == pytest.approx(0.0, abs=0.1)
    for seen in np.arange(0.0, 700.0, 20.0):  # who has driven it goes on into the second
        followed = route.project(100 * np.sin(seen / 100), 100 - 100 * np.cos(seen / 100))
    assert followed == pytest.approx(680.0, abs=1.0)
    fresh = RouteFollower(route.points)
    assert fresh.project(100 * np.sin(6.8), 100 - 100 * np.cos(6.8)) == pytest.approx(
        680.0 - 200 * np.pi, abs=1.0
    )


@pytest.mark.parametrize(
    'points', [[[0, 0]], [[0, 0], [0, 0]], [[0, 0], [np.nan, 1]], [[1, 2, 3], [4, 5, 6]]]
)
def test_routes_that_lead_nowhere_are_refused(points):
    with pytest.raises(ValueError, match='route'):
        RouteFollower(np.array(points, float))


def test_to_ego_looks_from_the_vehicle():
    assert to_ego([[1.0, 3.0]], 1.0, 1.0, np.pi / 2)[0] == pytest.approx([2.0, 0.0])


# ---- what the route asks for ----


def follower(points, **options):
    return RouteFollower(np.array(points, float), **options)


def test_a_route_that_turns_off_says_so_thirty_metres_before():
    route = follower([[0, 0], [100, 0], [100, 100]])
    for x, asked in ((20.0, Command.FOLLOW), (75.0, Command.LEFT)):
        assert route.guidance(ego(x=x)).command is asked
    assert route.guidance(ego(x=100.0, y=5.0, yaw=1.57)).command is Command.LEFT  # in the turn
    assert route.guidance(ego(x=100.0, y=40.0, yaw=1.57)).command is Command.FOLLOW
    mirrored = follower([[0, 0], [100, 0], [100, -100]])
    assert mirrored.guidance(ego(x=75.0)).command is Command.RIGHT


def test_a_gentle_bend_is_no_turn():
    angle = np.linspace(0, np.pi / 2, 100)
    bend = np.stack([80 * np.sin(angle), 80 - 80 * np.cos(angle)], 1)
    assert RouteFollower(bend).guidance(ego(x=20.0, y=2.5)).command is Command.FOLLOW


def test_given_commands_are_taken_as_they_come():
    asked = [Command.FOLLOW, Command.LANE_LEFT, Command.STRAIGHT, Command.FOLLOW]
    route = follower([[0, 0], [50, 0], [60, 3], [120, 3]], commands=asked)
    assert route.guidance(ego(x=10.0)).command is Command.FOLLOW
    assert route.guidance(ego(x=25.0)).command is Command.LANE_LEFT
    assert route.guidance(ego(x=45.0)).command is Command.LANE_LEFT
    assert route.guidance(ego(x=65.0, y=3.0)).command is Command.STRAIGHT
    assert route.guidance(ego(x=70.0), Command.RIGHT).command is Command.RIGHT  # who says so wins
    with pytest.raises(ValueError, match='commands for'):
        follower([[0, 0], [50, 0]], commands=asked)


def test_a_sparse_route_becomes_a_curve_along_its_headings():
    points, yaws = np.array([[0.0, 0.0], [10.0, 10.0]]), np.array([0.0, np.pi / 2])
    curve, owner = smooth(points, yaws, 0.5)
    radius = np.hypot(*(curve - (0.0, 10.0)).T)
    assert radius == pytest.approx(
        10.0, abs=0.7
    )  # a quarter of a circle; the chord would be 3 m inside
    assert curve[0] == pytest.approx(points[0]) and curve[-1] == pytest.approx(points[1])
    assert owner[0] == 0 and owner[-1] == 1 and owner[-2] == 0
    straight, _ = smooth(
        points, np.array([0.0, -np.pi / 2]), 0.5
    )  # against the chord: not believed
    assert np.hypot(*(straight[-3] - points[1])) < 2.0 and straight[-3][1] < 10.0


def test_coasting_is_a_turn_at_constant_speed():
    turning = EgoState(x=1.0, y=2.0, yaw=0.0, speed=5.0, yaw_rate=0.5)
    later = coast(turning, 0.2)
    assert later.yaw == pytest.approx(0.1) and later.speed == 5.0
    assert (later.x, later.y) == pytest.approx(
        (1.0 + 10 * np.sin(0.1), 12 - 10 * np.cos(0.1)), abs=1e-3
    )
    assert coast(turning, 0.0) == turning


def test_routes_that_can_not_be_meant_are_refused():
    straight = np.stack([np.arange(0.0, 500.0, 5.0), np.zeros(100)], 1)

    def check(route, place):
        follower = RouteFollower(route)
        check_guidance(follower.guidance(place), follower.distance)

    for fine in (ego(x=100.0), ego(x=100.0, y=20.0), ego(x=100.0, yaw=1.5), ego(x=498.0)):
        check(straight, fine)
    with pytest.raises(ValueError, match='100000 m away'):
        check(straight + (0.0, 1e5), ego(x=100.0))
    with pytest.raises(ValueError, match='leads back'):
        check(straight[::-1], ego(x=100.0))

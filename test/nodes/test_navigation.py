"""What nodes remember of odometry and route."""

import numpy as np
import pytest

from mose_ros.core.types import FAR_M, NEAR_M, Command, EgoState
from mose_ros.nodes.navigation import EgoHistory, RouteFollower, to_ego


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


@pytest.mark.parametrize(
    'points', [[[0, 0]], [[0, 0], [0, 0]], [[0, 0], [np.nan, 1]], [[1, 2, 3], [4, 5, 6]]]
)
def test_routes_that_lead_nowhere_are_refused(points):
    with pytest.raises(ValueError, match='route'):
        RouteFollower(np.array(points, float))


def test_to_ego_looks_from_the_vehicle():
    assert to_ego([[1.0, 3.0]], 1.0, 1.0, np.pi / 2)[0] == pytest.approx([2.0, 0.0])

import dataclasses

import numpy as np
import pytest

from mose_ros.core import action
from mose_ros.core.action import Normalizer
from mose_ros.core.types import COMMANDS, Command, EgoState, Guidance

EGO = EgoState(x=1.0, y=2.0, yaw=0.3, speed=5.0, acceleration=-1.0, yaw_rate=0.1, since_stop=7.0)
AHEAD = Guidance(near=np.array([10.0, 1.0]), far=np.array([25.0, -2.0]), command=Command.RIGHT)


def test_proprioception_is_what_its_names_say():
    named = dict(zip(action.PROPRIO, action.proprio(EGO, AHEAD).tolist(), strict=True))
    assert named['speed'] == 5.0
    assert named['acceleration'] == -1.0
    assert named['yaw_rate'] == pytest.approx(0.1)
    assert named['since_stop'] == 7.0
    assert (named['near_x'], named['near_y']) == (10.0, 1.0)
    assert (named['far_x'], named['far_y']) == (25.0, -2.0)
    commands = {command: named[f'command_{command.value}'] for command in COMMANDS}
    assert commands == {command: float(command is Command.RIGHT) for command in COMMANDS}


def test_proprioception_does_not_know_where_it_is():
    elsewhere = dataclasses.replace(EGO, x=500.0, y=-3.0, yaw=2.0)
    assert np.array_equal(action.proprio(elsewhere, AHEAD), action.proprio(EGO, AHEAD))


def test_a_stop_long_ago_is_as_good_as_none():
    def since(metres):
        index = action.PROPRIO.index('since_stop')
        return action.proprio(dataclasses.replace(EGO, since_stop=metres), AHEAD)[index]

    assert since(25.0) == since(1000.0) == since(float('inf')) == action.SINCE_STOP_MAX_M
    assert since(3.0) == 3.0


def test_what_is_not_finite_is_named():
    ego = dataclasses.replace(EGO, speed=float('nan'), since_stop=float('nan'))
    ahead = dataclasses.replace(AHEAD, far=np.array([25.0, np.inf]))
    with pytest.raises(ValueError, match='not finite: speed, since_stop, far_y'):
        action.proprio(ego, ahead)


def test_normalising_is_undone_and_maps_the_bounds_to_one():
    normal = Normalizer(np.array([-1.0, 0.0], np.float32), np.array([3.0, 10.0], np.float32))
    np.testing.assert_allclose(
        normal.encode(np.array([[-1.0, 10.0], [1.0, 5.0]])), [[-1, 1], [0, 0]]
    )
    values = np.random.default_rng(0).normal(0, 20, (50, 2))
    np.testing.assert_allclose(normal.decode(normal.encode(values)), values, rtol=1e-5, atol=1e-5)
    assert normal.encode(np.array([[7.0, 0.0]]))[0, 0] == 3.0  # not clipped


def test_fitting_takes_percentiles_and_survives_a_constant():
    samples = np.linspace(0, 100, 10001)[:, None] * [1.0, 0.0] + [0.0, 4.0]
    normal = Normalizer.fit(samples)
    np.testing.assert_allclose(normal.low, [1.0, 3.99], atol=1e-5)
    np.testing.assert_allclose(normal.high, [99.0, 4.01], atol=1e-5)


@pytest.mark.parametrize(('low', 'high'), [([0.0, 0.0], [1.0, 0.0]), ([0.0], [1.0, 1.0])])
def test_bounds_that_bound_nothing_are_refused(low, high):
    with pytest.raises(ValueError, match='need low < high of equal shape'):
        Normalizer(np.array(low), np.array(high))


def test_flow_integrates_the_velocity_from_noise():
    noise = np.array([1.0, -2.0])
    assert np.allclose(action.flow(lambda x, t: np.array([3.0, 4.0]), noise, 7), noise + [3, 4])
    assert np.allclose(action.flow(lambda x, t: -x, noise, 1), 0)  # one step of Euler's
    wide = action.flow(lambda x, t: -x, noise, 200)
    assert np.allclose(wide, noise / np.e, rtol=1e-4)
    assert not np.allclose(wide, noise / np.e, rtol=1e-7)


def test_the_flow_asks_once_a_step_and_more_often_near_the_action():
    times = []
    action.flow(lambda x, t: times.append(t) or x, np.ones(2), 8)
    assert len(times) == 8 and times[0] == 0
    steps = np.diff([*times, 1.0])
    assert (np.diff(steps) < 0).all()


def test_twice_the_steps_leave_a_quarter_of_the_error():
    def error(steps):
        return abs(action.flow(lambda x, t: np.cos(3 * t) - x, np.ones(1), steps)[0] - truth)

    # by the integrating factor: x(1) = (cos 3 + 3 sin 3) / 10 + 9 / (10 e)
    truth = (np.cos(3) + 3 * np.sin(3)) / 10 + 0.9 / np.e
    assert 3 < error(40) / error(80) < 6  # Euler's: 2
    assert error(40) < 1e-3


def test_flow_leaves_the_noise_as_it_was():
    noise = np.ones(2)
    action.flow(lambda x, t: x, noise, 2)
    assert np.array_equal(noise, np.ones(2))


def test_an_action_becomes_metres_clipped_to_what_was_seen():
    normal = Normalizer(np.zeros((3, 2), np.float32), np.full((3, 2), 10.0, np.float32))
    code = np.array([[-1.0, 1.0], [0.0, 0.5], [9.0, -9.0]])
    trajectory = action.to_trajectory(code, normal, time=4.0, dt=0.2)
    np.testing.assert_allclose(trajectory.xy, [[0, 10], [5, 7.5], [12.5, -2.5]])
    assert (trajectory.time, trajectory.dt) == (4.0, 0.2)
    assert trajectory.xy.dtype == np.float64


def test_an_action_that_is_not_finite_is_refused():
    normal = Normalizer(np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match='not finite'):
            action.to_trajectory(np.array([[bad, 0.0]]), normal, time=0.0, dt=0.2)

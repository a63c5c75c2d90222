import json

import numpy as np
import pytest
from scipy.signal import savgol_filter

from mose_ros.core.infractions import INFRACTIONS
from mose_ros.evaluation import report


def record(name, score=100.0, status='Completed', **infractions):
    return {
        'route_id': f'RouteScenario_{name}_rep0',
        'save_name': f'RouteScenario_{name}_rep0_Town12_{name}_1_15',
        'status': status,
        'scores': {'score_route': 100.0, 'score_penalty': 1.0, 'score_composed': score},
        'infractions': {key: list(value) for key, value in infractions.items()},
    }


def test_missing_routes_count_as_zero():
    records = [record('Accident'), record('ParkingExit', 60.0, collisions_vehicle=['crash'])]

    result = report.score(records, routes=4)

    assert (result['driving_score'], result['success_rate']) == (40.0, 0.25)
    assert result['warnings'] == ['2 of 4 routes are missing and count as zero']
    assert report.score(records, routes=2)['driving_score'] == 80.0
    with pytest.raises(ValueError, match='benchmark has 1'):
        report.score(records, routes=1)


def test_slowness_alone_is_no_failure():
    slow = record('Accident', min_speed_infractions=['Average speed is 80.5% of the usual one'])
    red = record('Accident', red_light=['Agent ran a red light'])
    late = record('Accident', status='Failed - Agent timed out')

    assert [report.is_success(one) for one in (slow, red, late)] == [True, False, False]


def test_efficiency_leaves_out_absurd_entries():
    entries = ['Average speed is 80.5% of', '119.5 %', '2000% of', 'nothing']

    assert report.efficiency([record('A', min_speed_infractions=entries), record('B')]) == 100.0
    assert report.efficiency([record('A')]) is None


def test_abilities_of_bench2drive_count_missing_routes_as_failures():
    records = [record('InvadingTurn'), record('YieldToEmergencyVehicle', red_light=['x'])]

    full = report.abilities(records, routes=220)
    small = report.abilities(records, routes=2)

    assert full['give_way'] == 0.1 and full['overtaking'] == 0.0
    assert small['give_way'] == 0.5 and small['overtaking'] is None
    assert small['mean'] == 0.5
    named = record('x') | {'scenario_name': 'ParkedObstacleTwoWays_3'}
    assert report.scenario_of(named) == 'ParkedObstacleTwoWays'
    assert report.scenario_of(record('ParkedObstacle')) == 'ParkedObstacle'


def test_as_many_routes_of_our_own_are_not_taken_for_bench2drives():
    ours = [record(str(seed)) | {'scenario_name': 'give_way'} for seed in range(220)]

    found = report.abilities(ours, routes=220)

    assert found['give_way'] == found['mean'] == 1.0 and found['overtaking'] is None
    theirs = [one | {'scenario_name': 'InvadingTurn_1'} for one in ours[:5]]
    assert report.abilities(theirs, routes=220)['overtaking'] == 0.0


def test_smoothing_equals_scipy():
    values = np.random.default_rng(0).normal(size=20)

    for derivative in (False, True):
        ours = report.smooth(values, 0.1, derivative=derivative)
        theirs = savgol_filter(values, 7, 2, deriv=int(derivative), delta=0.1)
        np.testing.assert_allclose(ours, theirs, atol=1e-9)
    assert np.abs(report.smooth(values, 0.1) - values).max() > 0.1


def steps(forward, yaw_rate=None):
    yaw_rate = np.zeros(len(forward)) if yaw_rate is None else yaw_rate
    return [
        {'acceleration': [0.0, a, 9.8], 'forward_vector': [0.0, 1.0, 0.0],
         'right_vector': [1.0, 0.0, 0.0], 'angular_velocity': [0.0, 0.0, w]}
        for a, w in zip(forward, yaw_rate, strict=True)
    ]  # fmt: skip


def test_comfort_counts_chunks_of_twenty():
    gentle, hard = np.full(20, 1.0), np.full(20, -5.0)

    assert report.comfort(steps(np.concatenate([gentle, hard, gentle[:7]])), 0.1) == 0.5
    assert report.comfort(steps(gentle[:5]), 0.1) == 1.0
    assert report.comfort(steps(hard), 0.1) == 0.0
    still = np.zeros(20)
    swerve = 0.9 * np.sin(np.linspace(0, 4 * np.pi, 20))
    assert report.comfort(steps(still, swerve), 0.1) == 1.0  # the official code does not look
    assert report.comfort(steps(still, np.degrees(swerve)), 0.1, corrected=True) == 0.0


def test_yaw_rates_are_degrees_a_second_which_the_official_code_takes_for_radians():
    still = np.zeros(20)

    def comforts(yaw_rate):
        return [
            report.comfort(steps(still, yaw_rate), 0.1, corrected=one) for one in (False, True)
        ]

    assert comforts(np.full(20, 20.0)) == [0.0, 1.0]  # 0.35 rad/s
    assert comforts(np.full(20, 60.0)) == [0.0, 0.0]  # 1.05 rad/s
    turns_in = np.repeat([0.0, 6.28], 10)
    assert comforts(turns_in) == [1.0, 1.0]  # to the official code a turn by 2 pi is none
    assert comforts(turns_in / 2) == [0.0, 1.0]


def test_a_file_of_ours_is_a_file_of_the_leaderboard(tmp_path):
    route = {
        'family': 'give_way', 'seed': 3, 'status': 'Completed', 'route_completion': 1.0, 'driving_score': 70.0,
        'infractions': {'red_light': ['Agent ran a red light']}, 'seconds': 20.0, 'wall_seconds': 4.0,
    }  # fmt: skip
    report.write_leaderboard(tmp_path / 'results.json', [route])

    (found,) = report.read_records(tmp_path / 'results.json')

    assert found['scores'] == {
        'score_route': 100.0,
        'score_penalty': 0.7,
        'score_composed': 70.0,
    }
    assert found['num_infractions'] == 1 and set(found['infractions']) == set(INFRACTIONS)
    assert report.score([found], 1)['abilities']['give_way'] == 0.0


@pytest.mark.parametrize(
    ('text', 'message'),
    [('{', 'not JSON'), ('{}', 'no _checkpoint'), ('[]', 'no _checkpoint'),
     (json.dumps({'_checkpoint': {'records': [{'route_id': 'a'}]}}), 'record 0 is broken')],
)  # fmt: skip
def test_broken_results_are_named(tmp_path, text, message):
    path = tmp_path / 'results.json'
    path.write_text(text)

    with pytest.raises(ValueError, match=message) as error:
        report.read_records(path)

    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match='cannot be read'):
        report.read_records(tmp_path / 'other.json')

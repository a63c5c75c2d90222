import json

import numpy as np
import pytest

from mose_ros.core.types import Command, EgoState, Guidance, Observation
from mose_ros.evaluation import closed_loop, report
from mose_ros.evaluation.__main__ import main, parse_families, parse_seeds
from mose_ros.evaluation.closed_loop import Config, ConstantVelocity
from mose_ros.evaluation.provenance import Store


def route(family, seed, success=True, score=100.0):
    return {
        'family': family, 'seed': seed, 'status': 'Completed' if success else 'Failed - Agent collided',
        'success': success, 'driving_score': score, 'route_completion': score / 100,
        'infractions': {} if success else {'collisions_vehicle': ['x']}, 'seconds': 10.0, 'wall_seconds': 1.0,
        'plan_ms': {'p50': 1.0, 'p99': 2.0}, 'comfort': 1.0, 'steps': [],
    }  # fmt: skip


def test_constant_velocity_follows_the_navigation():
    guidance = Guidance(near=np.array([9.9, 1.0]), far=np.array([24.0, 6.0]), command=Command.LEFT)
    observation = Observation(
        time=0.0, images={}, ego=EgoState(x=0.0, y=0.0, yaw=0.0, speed=2.0), guidance=guidance
    )

    trajectory = ConstantVelocity().plan(observation, None).trajectory

    assert trajectory.speeds() == pytest.approx(6.0, abs=0.05)
    away = np.hypot(*(trajectory.xy - guidance.near).T)
    assert away.min() < 0.7 and trajectory.xy[-1, 1] > 2


def test_a_step_of_the_metrics_is_carlas():
    ego = EgoState(x=1.0, y=2.0, yaw=np.pi / 2, speed=4.0, acceleration=1.0, yaw_rate=0.5)
    step = closed_loop._metric_step(ego)

    assert step['angular_velocity'] == [0.0, 0.0, pytest.approx(-28.6479)]  # deg/s, clockwise
    assert step['rotation'] == [0.0, -90.0, 0.0] and step['location'] == [1.0, -2.0, 0.0]
    assert step['acceleration'] == [-2.0, -1.0, 0.0]


def test_seeds_that_the_expert_fails_are_left_out_for_all(monkeypatch):
    def drive_all(policy, jobs, config):
        for job in jobs:
            success = job.seed != 1 if policy == 'expert' else job.seed == 0
            yield job, route(job.family, job.seed, success, 100.0 if success else 30.0)

    monkeypatch.setattr(closed_loop, '_drive_all', drive_all)
    config = Config(
        bundle='', families=('normal', 'merging'), seeds=(0, 1, 2), policies=('constant_velocity',)
    )

    result = closed_loop.run(config, bar=False)

    assert [(one['family'], one['seed']) for one in result['excluded']] == [
        ('normal', 1), ('merging', 1)
    ]  # fmt: skip
    assert result['expert_solves'] == {'normal': 2 / 3, 'merging': 2 / 3}
    figures = result['policies']['constant_velocity']
    assert (figures['success_rate'], figures['driving_score']) == (0.5, 65.0)
    assert figures['families']['merging']['success_rate'] == 0.5
    assert {'family', 'seed', 'status', 'infractions', 'seconds'} <= set(figures['routes'][0])
    assert 'expert' not in result['policies']
    json.dumps(closed_loop.without_steps(result), allow_nan=False)


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    driven = []

    def drive_all(policy, jobs, config):
        for job in jobs:
            if len(driven) == 2:
                raise KeyboardInterrupt
            driven.append(job.key)
            yield job, route(job.family, job.seed)

    monkeypatch.setattr(closed_loop, '_drive_all', drive_all)
    config = Config(bundle='', families=('normal',), seeds=(0, 1, 2), policies=('expert',))
    store = tmp_path / 'store'
    with pytest.raises(KeyboardInterrupt):
        closed_loop.run(config, store, bar=False)
    store.write_text(store.read_text() + '["expert/normal/2", {"fam')  # cut off while writing
    driven.clear()

    result = closed_loop.run(config, store, bar=False)

    assert driven == ['expert/normal/2'] and len(result['policies']['expert']['routes']) == 3
    assert not store.exists()


def test_results_of_other_code_are_not_kept(tmp_path):
    Store(tmp_path / 'store', 'one').add('a', {'x': 1})

    assert Store(tmp_path / 'store', 'one').results == {'a': {'x': 1}}
    assert Store(tmp_path / 'store', 'two').results == {}


def test_driving_the_simulator_from_the_command_line(tmp_path, capsys):
    arguments = ['closed-loop', 'none', '--families', 'normal', '--seeds', '20000-20001']
    arguments += ['--policies', 'expert,constant_velocity', '--processes', '2']
    arguments += ['--json', str(tmp_path / 'out.json'), '--leaderboard', str(tmp_path / 'board')]

    assert main(arguments) == 0

    result = json.loads((tmp_path / 'out.json').read_text())
    expert = result['policies']['expert']
    assert expert['success_rate'] == 1.0 and expert['driving_score'] == pytest.approx(100, abs=0.1)
    assert [one['seed'] for one in expert['routes']] == [20000, 20001]
    assert expert['routes'][0]['seconds'] > 5 and 'steps' not in expert['routes'][0]
    assert result['versions']['numpy'] == np.__version__ and result['machine']['cores'] >= 1
    records = report.read_records(tmp_path / 'board/expert/results.json')
    metrics = report.read_metrics(tmp_path / 'board/expert', records)
    scored = report.score(records, 2, metrics, sample_dt=0.1)
    assert scored['success_rate'] == 1.0 and scored['comfort']['routes'] == 2
    assert 0.2 < scored['comfort']['corrected'] <= 1.0
    assert 'constant_velocity' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--families', 'flying'], 'unknown family'),
        (['--seeds', '9-3'], 'expected FIRST-LAST'),
        (['--seeds', '-4'], None),
        (['--seeds', '99999999999'], 'seeds'),
        (['--policies', 'magic'], "unknown policy 'magic'"),
        (['--processes', '0', '--policies', 'expert'], '0 processes'),
        ([], 'no bundle'),
    ],
)
def test_wrong_input_is_told_at_once(tmp_path, capsys, arguments, message):
    try:
        code = main(['closed-loop', str(tmp_path / 'nothing'), *arguments])
    except SystemExit as error:  # argparse's own
        code = error.code

    assert code == 2
    assert message is None or message in capsys.readouterr().err


def test_seeds_and_families_are_read():
    assert parse_seeds('3, 7-9,3') == (3, 7, 8, 9)
    assert parse_families('merging,normal') == ('merging', 'normal')
    assert len(parse_families('all')) == 7

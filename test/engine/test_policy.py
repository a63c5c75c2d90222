import sys

import cv2
import numpy as np
import pytest

from engine import bundles
from mose_ros.core.rig import CAMERAS
from mose_ros.core.types import Command, EgoState, Guidance, Observation
from mose_ros.engine.__main__ import main
from mose_ros.engine.policy import Policy


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return bundles.make_bundle(tmp_path_factory.mktemp('policy') / 'known')


def observe(time=0.0, seed=0, cameras=CAMERAS):
    random = np.random.default_rng(seed)
    guidance = Guidance(near=np.array([10.0, 1.0]), far=np.zeros(2), command=Command.LEFT)
    return Observation(
        time=time,
        images={name: random.integers(0, 256, (60, 100, 3), np.uint8) for name in cameras},
        ego=EgoState(x=0.0, y=0.0, yaw=0.0, speed=5.0),
        guidance=guidance,
    )


def episode(policy, seeds):
    policy.reset()
    plans = [policy.plan(observe(time=index / 10, seed=s)) for index, s in enumerate(seeds)]
    return [(plan.trajectory.xy.tobytes(), plan.views, plan.skills) for plan in plans]


def test_an_episode_repeats_bit_for_bit_after_a_reset(folder):
    policy = Policy.load(folder, threads=1)
    first = episode(policy, range(8))
    assert episode(policy, range(8)) == first
    assert episode(policy, range(1, 9)) != first


def test_a_plan_counts_every_stage(folder):
    timings = Policy.load(folder, threads=1).plan(observe()).timings_ms
    assert list(timings) == ['glance', 'preprocess', 'vision', 'prefill', 'flow', 'total']
    assert timings['total'] >= sum(list(timings.values())[:-1])


def test_options_reach_the_view_router(folder):
    assert Policy.load(folder, mode='fixed').plan(observe()).views == ('front',)
    forced = Policy.load(folder, force_view='back_left').plan(observe())
    assert forced.views == ('front', 'back_left')


def test_a_front_camera_alone_is_enough(folder):
    policy = Policy.load(folder, threads=1)
    assert policy.plan(observe(cameras=['front'])).views == ('front',)
    assert list(policy.reason())[-1] in (bundles.DARK, bundles.BRIGHT)


# ---- python -m mose_ros.engine ----


def test_check_says_what_it_has_checked(folder, capsys):
    assert main(['check', str(folder)]) == 0
    out = capsys.readouterr().out
    assert '7 files' in out and '5 graphs' in out and 'twice' in out


def test_errors_are_one_line_and_a_failing_exit(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorrt', None)  # as where it is not installed
    assert main(['check', str(tmp_path / 'nothing')]) == 1
    assert 'is no bundle' in capsys.readouterr().err
    assert main(['build', str(folder), '--backend', 'tensorrt']) == 1
    assert 'error: TensorRT: it is not installed' in capsys.readouterr().err
    mad = bundles.make_bundle(tmp_path / 'mad', velocity_gain=float('inf'))
    assert main(['check', str(mad)]) == 1
    assert 'not finite' in capsys.readouterr().err


def test_build_has_nothing_to_do_for_onnxruntime(folder, capsys):
    assert main(['build', str(folder)]) == 0
    assert 'nothing to build' in capsys.readouterr().out


def test_run_answers_pictures(folder, tmp_path, capsys):
    picture = tmp_path / 'bright.png'
    cv2.imwrite(str(picture), np.full((120, 200, 3), 220, np.uint8))
    arguments = ['run', str(folder), '--front', str(picture), '--back-left', str(picture)]
    assert main([*arguments, '--speed', '5', '--command', 'left', '--near', '12', '3']) == 0
    out = capsys.readouterr().out
    assert 'front, back_left' in out
    assert 'vehicle > slowing > normal (merging)' in out
    assert 'x   12.00 m   y    3.00 m' in out
    assert bundles.BRIGHT in out


def test_run_names_a_picture_that_is_none(folder, tmp_path, capsys):
    (tmp_path / 'text.png').write_text('no picture')
    assert main(['run', str(folder), '--front', str(tmp_path / 'text.png')]) == 1
    assert 'text.png cannot be read as a picture' in capsys.readouterr().err
    assert main(['run', str(folder)]) == 1
    assert 'no picture was given' in capsys.readouterr().err

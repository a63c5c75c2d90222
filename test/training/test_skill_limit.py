"""A router learns from a limited set of skill labels: evenly over the skills, and the same set after every stop."""

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')

from mose_ros.training import checkpoints, config, loop, presets, stages  # noqa: E402
from mose_ros.training.index import Index  # noqa: E402
from mose_ros.training.samples import Samples  # noqa: E402


@pytest.fixture
def run(drawn):
    """Return a nano run whose router stage knows six labels, and its data."""
    training, data = drawn
    stage = replace(training.router, steps=4, batch_size=8, validate_every=9, skill_labels=6)
    return replace(training, router=stage), data


@pytest.fixture
def index(run):
    """Return 24 frames: merging is rare, and so are pedestrians; one frame has no label at all."""
    training, data = run
    found = Index.load(data, stages.model_config(training, data))
    skills = np.tile([1, 0, 1], (len(found), 1))
    skills[[3, 9, 20], 2], skills[[4, 9], 0], skills[7] = 2, 2, -1
    return replace(found, skills=skills)


def test_rare_skills_are_as_many_as_common_ones_and_the_seed_decides(index):
    everyone = np.arange(len(index))
    few = index.labelled(everyone, 8, seed=0)
    assert len(few) == len(set(few)) == 8 and 7 not in few
    assert {3, 4, 9, 20} <= set(few), 'all that are rare'
    assert np.array_equal(few, index.labelled(everyone, 8, seed=0))
    assert not np.array_equal(few, index.labelled(everyone, 8, seed=1))
    assert set(few) < set(index.labelled(everyone, 12, seed=0))
    assert np.array_equal(index.labelled(everyone, 24, seed=0), everyone)
    assert len(index.labelled(everyone, 23, seed=0)) == 23


def test_a_stage_never_asks_for_other_frames_and_a_stop_changes_nothing(
    run, tmp_path, monkeypatch
):
    training, data = run
    asked = []
    make = Samples.__getitem__

    def remember(samples, key):
        asked.append(key)
        return make(samples, key)

    def train(name, training, **limits):
        asked.clear()
        limits = stages.Limits(bar=False, **limits)
        stages.train('router', training, data, tmp_path / name, limits=limits)
        return [key for key in asked if key.numbers is not None]

    monkeypatch.setattr(Samples, '__getitem__', remember)
    straight = train('straight', training)
    with pytest.raises(loop.Stopped):
        train('stopped', training, stop_at=2)
    first = [key for key in asked if key.numbers is not None][:16]
    assert first + train('stopped', training)[-16:] == straight
    assert len({key.frame for key in straight}) == 6
    free = replace(training, router=replace(training.router, skill_labels=0))
    assert len({key.frame for key in train('free', free)}) > 6


def test_runs_from_before_a_setting_go_on_with_what_it_was(run, tmp_path):
    training, data = run
    before = replace(training, router=replace(training.router, skill_labels=0))
    limits = stages.Limits(bar=False, stop_at=1)
    with pytest.raises(loop.Stopped):
        stages.train('router', before, data, tmp_path / 'run', limits=limits)
    path = next((tmp_path / 'run').glob('checkpoint-*')) / checkpoints.STATE
    state = json.loads(path.read_text())
    del state['identity']['settings']['skill_labels'], state['identity']['settings']['accumulate']
    del state['identity']['model']['mose']['expert_groups']
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match='settings.skill_labels: 0 -> 6'):
        stages.train('router', training, data, tmp_path / 'run', limits=limits)
    done = stages.train('router', before, data, tmp_path / 'run', limits=stages.Limits(bar=False))
    assert done.is_dir()


def test_a_run_whose_samples_were_drawn_otherwise_is_not_gone_on_with(run, tmp_path):
    training, data = run
    stage = ('router', training, data, tmp_path / 'run')
    with pytest.raises(loop.Stopped):
        stages.train(*stage, limits=stages.Limits(bar=False, stop_at=1))
    path = next((tmp_path / 'run').glob('checkpoint-*')) / checkpoints.STATE
    state = json.loads(path.read_text())
    del state['identity']['draws']
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match='draws: 1 -> 2'):
        stages.train(*stage, limits=stages.Limits(bar=False))
    limits = stages.Limits(bar=False)
    stages.train(*stage, limits=limits, allow_changes=True)
    path = tmp_path / 'run' / stages.RESULT  # what is done is whole
    told = json.loads(path.read_text())
    del told['identity']['draws']
    path.write_text(json.dumps(told))
    assert stages.train(*stage, limits=limits).is_dir()


def test_a_router_has_as_many_labels_as_mose_where_nothing_else_is_said():
    plain = presets.Training(preset='own', model=presets.preset('nano').model)
    assert plain.router.skill_labels == 2000 and plain.sft.skill_labels == 0
    tiny = presets.preset('tiny')  # its first stage trains the eyes too
    assert tiny.router.skill_labels == 0
    limited = config.override(tiny, ['router.skill_labels=2000'])
    assert limited.router.skill_labels == 2000


@pytest.mark.parametrize('name', [*presets.PRESETS, 'tiny+groups'])
def test_experts_learn_under_the_skills_that_routers_choose(name):
    training = presets.preset(name)
    assert training.router.teacher_forcing == 1, 'no router can be trusted yet'
    assert training.sft.teacher_forcing == training.action.teacher_forcing == 0
    forced = config.override(training, ['action.teacher_forcing=0.7'])
    assert forced.action.teacher_forcing == 0.7

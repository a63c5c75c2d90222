"""A router learns from a limited set of skill labels: evenly over the skills, and the same set after every stop."""

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')

from mose_ros.core.skills import Taxonomy, default_path  # noqa: E402
from mose_ros.training import checkpoints, config, loop, presets, stages  # noqa: E402
from mose_ros.training.index import Index  # noqa: E402
from mose_ros.training.samples import Samples  # noqa: E402

CLIPS = ('normal_00000', 'merging_00000', 'merging_00001')  # of `drawn`
TAXONOMY = Taxonomy.load(default_path())
LEVELS = {level: TAXONOMY.names(level) for level in TAXONOMY.levels}


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


def write_labels(path, skills, source='clips', **levels):
    """Write what annotate would: a head, and a line a sample; one of them was refused."""
    known = {level: list(names) for level, names in LEVELS.items()}
    lines = [{'version': 1, 'source': source, 'levels': {**known, **levels}}]
    for name, chain in skills.items():
        chain = dict(zip(LEVELS, chain, strict=True))
        lines.append({'name': name, 'status': 'labelled', 'skills': chain})
    lines.append({'name': 'merging_00000:00001', 'status': 'refused', 'skills': {}})
    path.write_text('\n'.join(json.dumps(line) for line in lines) + '\n', encoding='utf-8')
    return path


SKILLS = {  # of the three clips, so on both sides of the split
    **{f'{clip}:00002': ('static_obstacle', 'crossing', 'overtaking') for clip in CLIPS},
    **{f'{clip}:00005': ('vehicle', 'slowing', 'general') for clip in CLIPS},
    'normal_00009:00000': ('vehicle', 'slowing', 'normal'),  # was not recorded
}


def test_a_router_learns_the_labels_of_a_file_alone(run, tmp_path, monkeypatch, caplog):
    training, data = run
    labels = write_labels(tmp_path / 'labels.jsonl', SKILLS)
    shown, make = [], Samples.__getitem__

    def remember(samples, key):
        made = make(samples, key)
        name = samples._index.clips[samples._index.clip[key.frame]]
        shown.append(
            (
                name,
                int(samples._index.frame[key.frame]),
                made['skills'].tolist(),
                int(made['action_skill']),
            )
        )
        return made

    monkeypatch.setattr(Samples, '__getitem__', remember)
    limits = stages.Limits(bar=False)
    made = {'limits': limits, 'labels': labels}
    stages.train('router', training, data, tmp_path / 'run', **made)

    levels = list(LEVELS.values())
    obstacle = [
        names.index(skill)
        for names, skill in zip(levels, SKILLS['normal_00000:00002'], strict=True)
    ]
    acting = [name for name in LEVELS['planning'] if name != 'general'].index('overtaking')
    assert {(frame, tuple(skills), act) for _, frame, skills, act in shown} == {
        (2, tuple(obstacle), acting),
        (5, (levels[0].index('vehicle'), levels[1].index('slowing'), 0), -1),
    }
    assert {clip for clip, *_ in shown} == set(CLIPS), 'validation has its own'
    assert '1 of 7 skill labels are of no annotated frame' in caplog.text
    told = json.loads((tmp_path / 'run' / stages.RESULT).read_text())
    assert told['identity']['frames'] == 6 and told['validation']['routers'] > 0
    assert stages.train('router', training, data, tmp_path / 'run', **made).is_dir()
    with pytest.raises(ValueError, match='labels: .* -> None; frames: 6 -> 24'):
        stages.train('router', training, data, tmp_path / 'run', limits=limits)
    write_labels(labels, {**SKILLS, 'normal_00000:00002': ('vehicle', 'slowing', 'normal')})
    with pytest.raises(ValueError, match='labels: '):
        stages.train('router', training, data, tmp_path / 'run', **made)


@pytest.mark.parametrize(
    ('skills', 'more', 'message'),
    [
        (SKILLS, {'source': 'coda_lm'}, "labels coda_lm; .* only clips' labels train at present"),
        (SKILLS, {'planning': ['general', 'hover']}, 'hover.*label again with its taxonomy'),
        ({'normal_00009:00000': SKILLS['normal_00009:00000']}, {}, 'none of 1 skill labels is of'),
        ({'normal_00000:00000': ('vehicle', 'slowing', 'hover')}, {}, "no skill 'hover' on level"),
    ],
)
def test_labels_of_something_else_are_refused(run, tmp_path, skills, more, message):
    training, data = run
    labels = write_labels(tmp_path / 'labels.jsonl', skills, **more)
    with pytest.raises(ValueError, match=message):
        stages.train('router', training, data, tmp_path / 'run', labels=labels)


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

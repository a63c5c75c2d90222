"""Settings: changed from the command line, compared, refused where they make no sense."""

from dataclasses import replace

import pytest

from mose_ros.core.types import FAMILIES
from mose_ros.training import collect, config, presets


def test_a_setting_changes_one_field_and_keeps_its_type():
    training = presets.preset('tiny')
    changed = config.override(
        training,
        [
            'action.learning_rate=1e-4',
            'collect.families=normal,merging',
            'model.vision.depth=2',
            'sft.losses.text=2',
            'router.losses.text=0.5',
        ],
    )
    assert changed.action.learning_rate == 1e-4
    assert changed.collect.families == ('normal', 'merging')
    assert (changed.model.vision.depth, training.model.vision.depth) == (2, 4)
    assert (changed.sft.losses.text, changed.router.losses.text) == (2.0, 0.5)
    assert changed.action.losses == training.action.losses


@pytest.mark.parametrize(
    ('setting', 'says'),
    [
        ('action.learning_rat=1', 'did you mean learning_rate'),
        ('acton.steps=1', 'did you mean action'),
        ('action.steps=many', 'expected int'),
        ('action.learning_rate=fast', 'is no number'),
        ('action=1', 'fields of its own'),
        ('action.steps.more=1', 'has no field'),
        ('action.steps', 'stage.field=value'),
    ],
)
def test_a_wrong_setting_is_refused_with_a_hint(setting, says):
    with pytest.raises(ValueError, match=says):
        config.override(presets.preset('nano'), [setting])


def test_mini_is_a_smaller_tiny_that_sees_the_same():
    tiny, mini = (presets.preset(name).model for name in ('tiny', 'mini'))
    assert (mini.vision.grid, mini.vision.patch) == (tiny.vision.grid, tiny.vision.patch)
    assert mini.mose.layers == tiny.mose.layers
    assert mini.decoder.width < tiny.decoder.width


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match='tiny, mini, nano'):
        presets.preset('huge')


def test_seeds_are_ranges_and_lists():
    assert config.parse_seeds('0-2,7') == (0, 1, 2, 7)


@pytest.mark.parametrize('text', ['', '5-3', 'x', '1-', '-4', '1,,2'])
def test_malformed_seeds_are_refused(text):
    with pytest.raises(ValueError, match='seeds'):
        config.parse_seeds(text)


def test_a_family_may_have_seeds_of_its_own():
    text = '0-2; parking_exit: 5,8-9'
    assert config.seeds_of(text, 'normal') == (0, 1, 2)
    assert config.seeds_of(text, 'parking_exit') == (5, 8, 9)
    assert config.seeds_of('merging:4', 'normal') == ()
    jobs = collect.jobs(config.Collect(families=('normal', 'parking_exit'), seeds='0-1;normal:7'))
    assert [job.name for job in jobs] == [
        'parking_exit_00000', 'parking_exit_00001', 'normal_00007',
    ]  # fmt: skip


@pytest.mark.parametrize('text', ['0-2;1', 'flying:3', ';', 'normal:20000', 'normal:'])
def test_seeds_of_families_are_checked(text):
    with pytest.raises(ValueError, match='seeds'):
        config.seeds_of(text, 'normal')


def test_a_dagger_round_changes_what_the_preset_says():
    nano = replace(presets.preset('nano'), rounds=(('collect.seeds=8-9',), ('action.steps=7',)))
    assert nano.of_round(0) == nano
    assert nano.of_round(1).collect.seeds == '8-9'
    assert nano.of_round(2).action.steps == 7 != nano.of_round(1).action.steps
    assert nano.of_round(3) == nano  # what is not said stays


def test_the_shipped_preset_drives_more_where_it_has_more_to_learn():
    tiny = presets.preset('tiny')
    of = {name: len(config.seeds_of(tiny.collect.seeds, name)) for name in FAMILIES}
    assert of['parking_exit'] > of['overtaking'] > of['merging'] > of['normal'] > 0
    seeds = [tiny.of_round(number).collect.seeds for number in range(1 + len(tiny.rounds))]
    drawn = [set(config.seeds_of(text, 'parking_exit')) for text in seeds]
    assert len(drawn) == 3 and not drawn[0] & drawn[1] and not drawn[1] & drawn[2]


def test_evaluation_seeds_are_never_trained_on():
    assert config.parse_seeds('19999') == (19999,)
    with pytest.raises(ValueError, match='kept for evaluation'):
        config.parse_seeds('19999-20000')


def test_differences_name_the_field_and_both_values():
    old = config.resolve(presets.preset('nano'))
    new = config.resolve(config.override(presets.preset('nano'), ['sft.seed=3']))
    assert list(config.differences(old, old)) == []
    assert list(config.differences(old, new)) == ['sft.seed: 0 -> 3']
    assert config.digest(old) != config.digest(new)

"""A stage may begin with a network that was made elsewhere, and then speaks that network's words."""

import json
from dataclasses import replace

import pytest

pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')

import torch  # noqa: E402

from mose_ros.core.bundle import TOKENIZER  # noqa: E402
from mose_ros.core.prompt import Tokenizer  # noqa: E402
from mose_ros.modeling import config as modeling_config  # noqa: E402
from mose_ros.modeling.driver import MoseDriver, read_config  # noqa: E402
from mose_ros.training import __main__ as command  # noqa: E402
from mose_ros.training import annotate, convert, presets, stages  # noqa: E402
from mose_ros.training.config import resolve  # noqa: E402
from mose_ros.training.fit import Fit  # noqa: E402
from test.training.test_convert import SMALL, qwen2vl  # noqa: E402


@pytest.fixture
def elsewhere(drawn, tmp_path):
    """Return the data, and a nano whose words and special tokens have other numbers, beside it its tokenizer."""
    training, data = drawn
    folder = tmp_path / 'elsewhere'
    ours = json.loads((data / annotate.TOKENIZER).read_text(encoding='utf-8'))
    vocabulary, last = ours['model']['vocab'], len(ours['model']['vocab']) - 1
    ours['model']['vocab'] = {word: last - number for word, number in vocabulary.items()}
    for token in ours['added_tokens']:
        token['id'] = last - token['id']
    config = stages.model_config(training, data)
    image = last - config.decoder.image_id
    torch.manual_seed(3)
    MoseDriver(replace(config, decoder=replace(config.decoder, image_id=image))).save(folder)
    (folder / TOKENIZER).write_text(json.dumps(ours), encoding='utf-8')
    return data, folder


def test_a_run_begins_with_a_network_from_elsewhere(elsewhere, tmp_path):
    data, before = elsewhere
    work = tmp_path / 'run'
    run = ['router', '--preset', 'nano', '--work', str(work), '--data', str(data), '--quiet']
    run += ['--before', str(before), '--set', 'router.learning_rate=0', '--set', 'router.steps=1']
    assert command.main(run) in (0, None)
    made = work / 'router' / stages.MODEL
    assert (made / TOKENIZER).read_bytes() == (before / TOKENIZER).read_bytes()
    assert (made / TOKENIZER).read_bytes() != (data / annotate.TOKENIZER).read_bytes()
    was, now = (MoseDriver.load(folder).state_dict() for folder in (before, made))
    assert all(torch.equal(was[name], now[name]) for name in was)
    told = json.loads((made.parent / stages.RESULT).read_text(encoding='utf-8'))
    assert told['steps'] == 1


def test_words_of_another_network_are_refused(elsewhere, tmp_path):
    data, before = elsewhere
    (before / TOKENIZER).unlink()
    with pytest.raises(ValueError, match='put the tokenizer.json that it was made with'):
        stages.train('router', presets.preset('nano'), data, tmp_path / 'run', before=before)


@pytest.fixture
def wide(drawn, tmp_path):
    """Return the data, and a network of nano's with another action expert, as no preset has it."""
    training, data = drawn
    config = stages.model_config(training, data)
    folder = tmp_path / 'wide' / 'model'
    torch.manual_seed(4)
    MoseDriver(replace(config, action=replace(config.action, width=24, sigma=0.01))).save(folder)
    return data, folder


def begin(data, before, work, *settings, preset='nano', stage='router'):
    run = [stage, '--preset', preset, '--work', str(work), '--data', str(data), '--quiet']
    run += ['--before', str(before), '--set', f'{stage}.steps=1']
    for one in settings:
        run += ['--set', one]
    return command.main(run)


def test_what_nobody_asked_for_follows_the_network_and_is_told_so(wide, tmp_path):
    data, before = wide
    assert begin(data, before, tmp_path / 'run') == 0
    made = tmp_path / 'run' / 'router' / stages.MODEL
    config = read_config(made)
    assert config == read_config(before) and config.action.width == 24
    assert config.action != presets.preset('nano').model.action
    own = resolve(config)
    assert Fit.load(made).training['model'] == own
    for file, place in ((stages.RESULT, 'identity'), (stages.CONFIG, None)):
        told = json.loads((made.parent / file).read_text(encoding='utf-8'))
        assert (told[place] if place else told)['model'] == own


def test_what_no_weight_depends_on_may_be_another(wide, tmp_path):
    data, before = wide
    asked = ['model.action.flow_samples=3', 'model.action.top_k=3']
    assert begin(data, before, tmp_path / 'run', *asked) == 0
    made = tmp_path / 'run' / 'router' / stages.MODEL
    action = read_config(made).action
    assert (action.flow_samples, action.top_k, action.sigma) == (3, 3, 0.01)
    driver = MoseDriver.load(made)
    assert driver.action_expert.config.top_k == 3


@pytest.mark.parametrize(
    ('preset', 'settings', 'told'),
    [
        ('nano+sft', [], 'mose.routing: skill, not none'),
        ('nano', ['model.action.width=32'], 'action.width: 24, not 32'),  # nano's own, but typed
        ('nano', ['model.action.routing=token'], 'action.routing: trajectory, not token'),
        ('nano', ['model.mose.layers=[[0],[1],[3]]'], 'mose.layers: '),
        ('nano', ['model.semantic_classes=14'], 'semantic_classes: 0, not 14'),
        (
            'nano+groups',
            ['model.action.horizon=9'],
            'mose.expert_groups: False, not True; action.h',
        ),
    ],
)
def test_what_the_network_cannot_become_is_refused_by_name(
    wide, tmp_path, capsys, preset, settings, told
):
    data, before = wide
    assert begin(data, before, tmp_path / 'run', *settings, preset=preset) == 1
    error = capsys.readouterr().err
    assert f'{before} has {told}' in error and 'leave the settings out' in error
    assert not (tmp_path / 'run' / 'router' / stages.MODEL).exists()


def test_a_model_that_a_caller_changed_is_asked_for_too(wide, tmp_path):
    data, before = wide
    nano = presets.preset('nano')
    other = replace(nano, model=replace(nano.model, cameras=nano.model.cameras[:4]))
    with pytest.raises(ValueError, match='cameras: '):
        stages.train('router', other, data, tmp_path / 'run', before=before)


def test_another_network_of_the_same_name_is_another_run(wide, tmp_path, capsys):
    data, before = wide
    other = tmp_path / 'wide' / 'other'
    driver = MoseDriver.load(before)
    with torch.no_grad():
        driver.action_expert.router.bias.add_(1)
    driver.save(other)
    assert begin(data, before, tmp_path / 'run') == 0
    moved = before.rename(tmp_path / 'moved')
    assert begin(data, moved, tmp_path / 'run') == 0, 'it is the same, wherever it lies'
    assert begin(data, other, tmp_path / 'run') == 1
    assert 'before: sha256 ' in capsys.readouterr().err
    path = tmp_path / 'run' / 'router' / stages.RESULT  # once, only the folder's name was known
    told = json.loads(path.read_text(encoding='utf-8'))
    told['identity']['before'] = 'wide'
    path.write_text(json.dumps(told), encoding='utf-8')
    assert begin(data, moved, tmp_path / 'run') == 0


@pytest.fixture
def qwen(drawn, tmp_path):
    """Return the data, and the folder of a small random Qwen2-VL that knows its words."""
    _, data = drawn
    words = data / annotate.TOKENIZER
    network = qwen2vl(vocab_size=Tokenizer.load(words).vocab_size)
    network.config.image_token_id = Tokenizer.load(words).image_id
    network.save_pretrained(tmp_path / 'qwen')
    (tmp_path / 'qwen' / TOKENIZER).write_bytes(words.read_bytes())
    return data, tmp_path / 'qwen'


def short(verb, preset, data, work, *more):
    run = [verb, '--preset', preset, '--work', str(work), '--data', str(data), '--quiet']
    settings = ['data.workers=0', 'data.validation_share=0.5']
    for stage in presets.STAGES:
        settings += [f'{stage}.{one}' for one in ('steps=2', 'batch_size=4', 'warmup=1')]
        settings += [f'{stage}.validate_samples=4', f'{stage}.learning_rate=0.01']
    return command.main([*run, *(word for one in settings for word in ('--set', one)), *more])


def moved(before, after):
    """Return which weights are others."""
    was, now = (MoseDriver.load(folder).state_dict() for folder in (before, after))
    return {name for name, value in was.items() if not torch.equal(value, now[name])}


@pytest.mark.parametrize(
    ('variant', 'settings'),
    [('sft', ['mose.routing=none']), ('moe_41', ['mose.routing=token', 'mose.token_experts=4'])],
)
def test_a_baseline_of_a_qwen2vl_needs_no_stage_of_routers(
    qwen, tmp_path, capsys, variant, settings
):
    data, source = qwen
    made = tmp_path / 'made'
    convert.convert(source, made, settings=[*SMALL, 'action.horizon=6', *settings])
    preset, work = f'qwen2vl_2b+{variant}', tmp_path / 'work'
    begins = ['--before', str(made)]
    for verb in ('router', 'all'):
        assert short(verb, preset, data, work, *begins) == 1
        assert (
            f'has none; it needs no such stage: go on with `sft --before {made}`'
            in capsys.readouterr().err
        )
    assert short('sft', preset, data, work) == 1
    assert 'run the stage before sft first, or name by --before' in capsys.readouterr().err

    assert short('sft', preset, data, work, *begins) == 0
    assert short('action', preset, data, work) == 0

    learned = moved(made, work / 'sft' / stages.MODEL)
    assert learned and all('.mlp.' in name for name in learned), 'the blocks alone'
    acted = moved(work / 'sft' / stages.MODEL, work / 'action' / stages.MODEL)
    assert any(name.startswith('action_expert.') for name in acted)
    assert read_config(work / 'action' / stages.MODEL) == read_config(made)


def test_a_large_network_has_to_be_there(drawn, tmp_path, capsys):
    _, data = drawn
    for verb in ('router', 'all'):
        assert short(verb, 'qwen2vl_2b', data, tmp_path) == 1
        assert (
            'router of qwen2vl_2b moves routers of a network that is there'
            in capsys.readouterr().err
        )
    assert not (tmp_path / 'router').exists()


def test_a_widened_network_keeps_its_routers(drawn, tmp_path):
    _, data = drawn
    one, wide = tmp_path / 'one', tmp_path / 'wide'
    assert short('router', 'nano', data, one) == 0
    convert.widen(one / 'router' / stages.MODEL, wide)
    choice = ['--before', str(wide), '--set', 'sft.trainable=experts']
    assert short('sft', 'nano+groups', data, tmp_path / 'two', *choice) == 0
    learned = moved(wide, tmp_path / 'two' / 'sft' / stages.MODEL)
    assert any('image_experts' in name for name in learned)
    assert not any('router' in name for name in learned)
    assert short('sft', 'nano', data, one) == 0, 'without --before it is the stage before'
    assert any(
        'router' in name
        for name in moved(one / 'router' / stages.MODEL, one / 'sft' / stages.MODEL)
    )


def test_the_large_preset_moves_what_the_papers_move():
    training = presets.preset('qwen2vl_2b')
    with torch.device('meta'):
        driver = MoseDriver(modeling_config.preset('qwen2vl_2b'))
    moving = {}
    for name in presets.STAGES:
        driver.train_only(getattr(training, name).trainable)
        moving[name] = sum(p.numel() for p in driver.parameters() if p.requires_grad)
    assert moving['router'] < 1e5 < 2.8e9 < moving['sft'] < 2.9e9 < moving['action'] < 3.1e9
    assert not any(p.requires_grad for p in driver.vlm.model.visual.parameters())
    stage = training.sft
    assert stage.gradient_checkpointing and stage.bfloat16 and not presets.Stage().bfloat16

"""A stage may begin with a network that was made elsewhere, and then speaks that network's words."""

import json
from dataclasses import replace

import pytest

pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')

import torch  # noqa: E402

from mose_ros.core.bundle import TOKENIZER  # noqa: E402
from mose_ros.modeling import config as modeling_config  # noqa: E402
from mose_ros.modeling.driver import MoseDriver  # noqa: E402
from mose_ros.training import __main__ as command  # noqa: E402
from mose_ros.training import annotate, presets, stages  # noqa: E402


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

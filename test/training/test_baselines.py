"""Baselines are settings of a preset: composed by name, trained by the same command, exported by the same graphs."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from mose_ros.core import prompt
from mose_ros.core.action import PROPRIO, Normalizer
from mose_ros.core.bundle import Manifest
from mose_ros.core.rig import CAMERAS
from mose_ros.engine import session
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.view_router import ViewRouter
from mose_ros.modeling import config as modeling_config
from mose_ros.modeling.batch import LossWeights
from mose_ros.modeling.driver import MoseDriver
from mose_ros.training import annotate, export, graphs, parity, presets, stages
from mose_ros.training.batches import validation_keys
from mose_ros.training.config import override
from mose_ros.training.fit import Fit
from mose_ros.training.index import Index
from mose_ros.training.moments import fake_moments
from mose_ros.training.samples import Samples


def test_variants_are_settings_of_a_preset():
    plain, named = presets.preset('tiny'), presets.preset('tiny+moe_81+drive_pi0')
    assert named == override(
        presets.preset('tiny+drive_pi0'),
        ['model.mose.routing=token', 'model.mose.token_experts=8', f'preset={named.preset}'],
    )
    assert (named.data.fixed_views, named.data.top_k) == (('front',), 0)
    assert named.model.action.moe_layers == 0 and named.action.losses.view_router == 0
    assert (plain.data.top_k, plain.model.mose.routing) == (1, 'skill')
    assert plain.model.action.moe_layers == 2 and plain.action.losses.view_router == 0.2
    for name in presets.VARIANTS:
        assert presets.preset(f'nano+{name}') != presets.preset('nano'), name
    assert presets.preset('nano+all_views').data.fixed_views == CAMERAS
    assert len(presets.preset('nano+three_views').data.fixed_views) == 3
    with pytest.raises(ValueError, match="no variant 'moe_91'; known: sft, moe_41"):
        presets.preset('tiny+moe_91')
    with pytest.raises(ValueError, match="no preset 'huge'"):
        presets.preset('huge+sft')


def make(folder, variants):
    """Return a nano run, and its network with weights that all matter."""
    torch.manual_seed(0)
    training = presets.preset(f'nano+{variants}')
    prompt.word_tokenizer(annotate.vocabulary()).save(str(folder / 'tokenizer.json'))
    config = modeling_config.preset(
        'nano',
        tokenizer=prompt.Tokenizer.load(folder / 'tokenizer.json'),
        mose=training.model.mose,
        action=training.model.action,
    )
    driver = MoseDriver(config).eval()
    with torch.no_grad():
        for weight in driver.parameters():
            weight.add_(0.5 * weight.std(correction=0) * torch.randn_like(weight))
    return training, driver


def test_a_token_moe_without_view_and_action_routers_becomes_a_bundle(tmp_path):
    training, driver = make(tmp_path, 'moe_41+drive_pi0')
    config = driver.config
    reach = np.ones((config.action.horizon, 2), np.float32)
    bundling = export.Bundling(
        name='baseline',
        tokenizer=tmp_path / 'tokenizer.json',
        action=Normalizer(-10 * reach, 30 * reach),
        proprio=Normalizer(np.full(len(PROPRIO), -20.0), np.full(len(PROPRIO), 20.0)),
        fixed_views=training.data.fixed_views,
        top_k=training.data.top_k,
        num_steps=2,
        max_new_tokens=4,
    )
    moments = fake_moments(config.cameras, count=3)

    export.export(driver, tmp_path / 'bundle', bundling, moments=moments)

    manifest = Manifest.load(tmp_path / 'bundle')
    assert list(manifest.levels.values()) == [['general']] * 3  # no skill is chosen
    assert list(manifest.action_skills) == ['general']
    found = manifest.parity
    assert found['logits_max_abs'] < 1e-4 and found['trajectory_max_m'] < 1e-4
    assert found['text_equal'] and found['views_equal'] and found['skills_equal']
    experts = 3 * config.mose.token_experts
    assert found['experts_reached'] == found['experts_total'] == 3 + 1 + experts
    views = ViewRouter(tmp_path / 'bundle').select(
        0.0, moments[0].images, moments[0].ego, moments[0].guidance
    )
    assert views.names == ('front',)

    bundle = Bundle.open(tmp_path / 'bundle', threads=1)
    for expert in (1, 3):  # whichever the tokens of these moments choose
        changed = deepcopy(driver)
        mixture = changed.vlm.model.language_model.layers[2].mlp
        with torch.no_grad():
            mixture.experts[expert].down_proj.weight.mul_(1.5)
        found = parity.parity(changed, bundle, moments[:1])
        assert found['experts_reached'] < found['experts_total']


@pytest.mark.parametrize(
    ('variants', 'graph', 'output'),
    [('sft', 'prefill', 'logits'), ('token_action', 'action', 'velocity')],
)
def test_graphs_of_baselines_do_what_their_networks_do(tmp_path, variants, graph, output):
    _, driver = make(tmp_path, variants)
    inputs = graphs.example_inputs(driver)[graph]
    path = tmp_path / 'graph.onnx'
    path.write_bytes(graphs.trace(driver, graph).SerializeToString())
    exported = session.open_session(path, threads=1)
    part = graphs.PARTS[graph](driver)
    place = part.outputs().index(output)
    answers = []
    for sign in (1, -1):
        for name in ('embeds', 'noisy'):
            if name in inputs:
                inputs[name] = sign * inputs[name]
        with torch.no_grad():
            want = part(*inputs.values())[place]
        answers.append(exported.run({name: value.numpy() for name, value in inputs.items()}))
        np.testing.assert_allclose(answers[-1][output], want.numpy(), atol=1e-4)
    assert not np.allclose(answers[0][output], answers[1][output], atol=1e-2)


@pytest.mark.parametrize('variant', ['', '+sft', '+moe_41'])
def test_a_stage_trains_the_same_layers_of_every_baseline(drawn, tmp_path, variant):
    _, data = drawn
    training = override(presets.preset(f'nano{variant}'), ['sft.trainable=experts'])
    training = replace(training, sft=replace(training.sft, losses=LossWeights(view_router=0)))
    limits = stages.Limits(bar=False)
    model = stages.train('sft', training, data, tmp_path / 'sft', limits=limits)
    torch.manual_seed(training.sft.seed)
    fresh = MoseDriver(stages.model_config(training, data)).state_dict()
    trained = MoseDriver.load(model).state_dict()
    moved = {name for name in fresh if not torch.equal(fresh[name], trained[name])}
    blocks = {name.partition('.mlp.')[0] for name in moved}
    assert blocks == {f'vlm.model.language_model.layers.{layer}' for layer in (1, 2, 3)}
    assert any('experts' in name for name in moved) == (variant != '+sft')


@pytest.mark.parametrize(
    ('variants', 'views', 'parts'),
    [
        ('sft+drive_pi0', 1, {'text', 'flow'}),
        ('moe_81+all_views+token_action', 6, {'text', 'flow', 'action_router', 'balance'}),
    ],
)
def test_baselines_train_on_their_views(drawn, tmp_path, variants, views, parts):
    _, data = drawn
    training = presets.preset(f'nano+{variants}')
    limits = stages.Limits(bar=False)
    model = stages.train('action', training, data, tmp_path / 'action', limits=limits)
    fit = Fit.load(model)
    made_of = replace(training, model=stages.model_config(training, data))
    assert fit == Fit.to_data(data, made_of) and fit.data['clips'] == 3
    assert (tuple(fit.fixed_views), fit.top_k) == (training.data.fixed_views, 0)
    assert (model / 'tokenizer.json').read_bytes() == (data / 'tokenizer.json').read_bytes()
    told = json.loads((model.parent / stages.RESULT).read_text(encoding='utf-8'))
    assert parts <= set(told['validation']) and told['validation']['ade_m'] > 0
    absent = {'routers', 'view_router', 'action_router', 'balance'} - parts
    assert not absent & set(told['validation'])
    config = MoseDriver.load(model).config
    samples = Samples(Index.load(data, config), config, training.data)
    keys = validation_keys(samples._index, training.data, 2, 2)
    assert samples[keys[0][0]]['patches'].shape[0] == views

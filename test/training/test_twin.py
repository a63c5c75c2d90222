"""A bundle's twin: the same shape, random weights, as checkpoint and as bundle; and PyTorch that is compared with it."""

import argparse
import json

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')

from dataclasses import asdict, replace  # noqa: E402

from engine import bundles  # noqa: E402
from mose_ros.core.bundle import Manifest  # noqa: E402
from mose_ros.engine import counting  # noqa: E402
from mose_ros.engine.bundle import Bundle  # noqa: E402
from mose_ros.engine.contestants import Engine, Looking  # noqa: E402
from mose_ros.engine.scenery import Scenery  # noqa: E402
from mose_ros.engine.session import open_session  # noqa: E402
from mose_ros.engine.turns import apart  # noqa: E402
from mose_ros.modeling import config as modeling_config  # noqa: E402
from mose_ros.modeling.mixture import SkillMixture, TokenMixture  # noqa: E402
from mose_ros.training import opponent, twin  # noqa: E402

PLANS = 4


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """Return a bundle that says of itself that it was made of a network of two layers, one of them a mixture of two skills."""
    nano = modeling_config.PRESETS['nano']
    nano = replace(
        nano,
        decoder=replace(nano.decoder, layers=2),
        mose=replace(nano.mose, layers=((1,),)),
        action=replace(nano.action, horizon=15),
    )
    return bundles.make_bundle(
        tmp_path_factory.mktemp('source') / 'known',
        training={'model': asdict(nano)},
        levels={'planning': ['general', 'normal']},
        action_skills=['normal', 'merging'],
    )


@pytest.fixture(scope='module')
def made(source, tmp_path_factory):
    out = tmp_path_factory.mktemp('twins') / 'same'
    assert twin.main([str(source), str(out), '--set', 'decoder.rms_norm_eps=1e-5']) == 0
    return out


def test_a_twin_has_the_bundles_shape_and_is_made_once(source, made):
    m, own = Manifest.load(made / 'bundle'), Manifest.load(source)
    assert (m.cameras, m.vocab_size, m.noise) == (own.cameras, own.vocab_size, own.noise)
    assert m.training['model']['decoder']['rms_norm_eps'] == 1e-5
    assert m.parity['skills_equal'] and m.parity['trajectory_max_m'] < 1e-3
    before = (made / 'bundle/manifest.json').stat().st_mtime_ns
    assert twin.make(source, made, ['decoder.rms_norm_eps=1e-5']) == m
    assert (made / 'bundle/manifest.json').stat().st_mtime_ns == before
    told = json.loads((made / twin.SOURCE).read_text())
    assert told['settings'] == ['decoder.rms_norm_eps=1e-5']


def test_a_decoder_costs_what_counting_by_hand_says(made):
    bundle = Bundle.open(made / 'bundle', backend='onnxruntime')
    scenery = Scenery(bundle.manifest)
    runs = counting.watch(Engine(bundle, scenery))
    tokens = next(one.inputs['input_ids'].shape[1] for one in runs if one.graph == 'prefill')
    decoder = modeling_config.PRESETS['nano'].decoder
    width, inner = decoder.width, decoder.kv_heads * decoder.head_dim
    project = 2 * tokens * width * (width + 2 * inner)  # queries, keys and values of all tokens
    out, ffn = 2 * width * width, 2 * 3 * width * decoder.ffn  # of one token
    first = project + tokens * (out + 4 * tokens * width + ffn)
    # of the last token alone, whose chosen expert runs beside the shared one
    last = project + out + 4 * tokens * width + 2 * ffn
    head = 2 * width * bundle.manifest.vocab_size
    by_hand = first + last + head
    counted = counting.stage_costs(bundle, runs)['prefill'].flops
    assert counted == pytest.approx(by_hand, rel=0.02)
    assert counted != pytest.approx(by_hand - tokens * ffn, rel=0.02)
    assert counted != pytest.approx(2 * first + head, rel=0.02)


@pytest.mark.parametrize('looking', [Looking(), Looking(views=3, force_view='back')])
def test_pytorch_as_an_opponent_answers_as_the_engine_does(source, made, looking):
    options = argparse.Namespace(
        kind='eager',
        bundle=made / 'bundle',
        checkpoint=made / 'checkpoint',
        threads=1,
        clip='',
        views=looking.views,
        mode=looking.mode,
        view=looking.force_view,
    )
    facts, plan = opponent.start(options)
    assert facts['versions']['torch'] and 'compile_s' not in facts
    bundle = Bundle.open(made / 'bundle', backend='onnxruntime')
    ours = Engine(bundle, Scenery(bundle.manifest), looking)
    answers = [[one(index) for index in range(PLANS)] for one in (ours.plan, plan)]
    found = apart(*answers)
    assert found['trajectory_max_m'] < 1e-3 and found['views_equal_share'] == 1.0
    assert all(turn.ms > 0 for turn in answers[1])
    late = [plan(index + 5) for index in range(PLANS)]  # of other moments
    assert apart(answers[0], late)['trajectory_max_m'] > 1e-3


def test_tokens_in_groups_are_what_tokens_one_by_one_are(tmp_path):
    torch.manual_seed(0)
    mixture = TokenMixture(16, 24, 4, 0.5).eval()
    twin.write_block(tmp_path / 'token.onnx', twin.GroupedMixture.of(mixture))
    session = open_session(tmp_path / 'token.onnx', backend='onnxruntime', provider='CPU')
    for tokens in (9, 2):  # of fewer tokens than experts some get none
        x = torch.randn(1, tokens, 16)
        with torch.no_grad():
            answer, gates = mixture(x)
        got = session.run({'x': x.numpy()})['y']
        np.testing.assert_allclose(got, answer.numpy(), atol=1e-5)
    assert len(set(gates.argmax(-1).flatten().tolist())) > 1
    other = TokenMixture(16, 24, 4, 0.5).eval()
    assert np.abs(got - other(x)[0].detach().numpy()).max() > 1e-3


def test_a_skill_block_is_of_the_chosen_expert(tmp_path):
    torch.manual_seed(0)
    mixture = SkillMixture(16, 24, 3, 0.5).eval()
    twin.write_block(tmp_path / 'skill.onnx', mixture)
    session = open_session(tmp_path / 'skill.onnx', backend='onnxruntime', provider='CPU')
    x = torch.randn(1, 7, 16)
    for expert in range(3):
        chosen = torch.tensor([[expert]])
        with torch.no_grad():
            want = mixture(x, chosen).numpy()
        got = session.run({'x': x.numpy(), 'chosen': chosen.numpy()})['y']
        np.testing.assert_allclose(got, want, atol=1e-5)
        other = session.run({'x': x.numpy(), 'chosen': (chosen + 1).numpy() % 3})['y']
        assert np.abs(got - other).max() > 1e-4


def test_depth_and_experts_can_be_changed(source):
    m = Manifest.load(source)
    deeper = twin.config_of(m, layers=8, experts=3)
    assert deeper.decoder.layers == 8 and deeper.mose.layers == ((7,),)
    assert deeper.mose.levels['planning'] == ('general', 'skill_1', 'skill_2')
    same = twin.config_of(m)
    assert same.mose.layers == ((1,),) and same.decoder.vocab_size == m.vocab_size
    assert same.mose.levels['planning'] == tuple(m.levels['planning'])


def test_a_bundle_that_does_not_say_its_network_has_no_twin(tmp_path, capsys):
    folder = bundles.make_bundle(tmp_path / 'silent')
    assert twin.main([str(folder), str(tmp_path / 'out')]) == 1
    assert 'does not say in manifest.json what network' in capsys.readouterr().err

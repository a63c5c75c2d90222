"""Any checkpoint becomes a bundle by itself, or is refused before anything is written; a kill leaves the old one whole."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from mose_ros.core import prompt
from mose_ros.core.bundle import GRAPHS, BundleError, Manifest, sha256
from mose_ros.core.skills import Taxonomy
from mose_ros.engine.policy import Policy
from mose_ros.modeling.driver import MoseDriver
from mose_ros.training import __main__ as command
from mose_ros.training import annotate, convert, export, room
from mose_ros.training.fit import FIT, Fit
from mose_ros.training.moments import fake_moments
from mose_ros.training.stored import count_numbers

SETTINGS = (
    *('vision.view_width=64', 'vision.view_height=32', 'mose.layers=[[3]]'),
    *('action.width=32', 'action.ffn=48', 'action.moe_layers=1', 'action.horizon=6'),
)
SKILLS = Taxonomy({'planning': {'general': '', 'normal': '', 'give_way': ''}})
PARITY = [  # what the report says, whatever else
    *('logits_max_abs', 'text_equal', 'views_equal', 'skills_equal', 'trajectory_max_m'),
    *('experts_reached', 'experts_total'),
]


@pytest.fixture(scope='module')
def qwen(tmp_path_factory):
    """Return the folder of a small random Qwen2-VL, as `save_pretrained` writes it, with a tokenizer."""
    folder = tmp_path_factory.mktemp('hf') / 'qwen'
    tokenizer = prompt.word_tokenizer(annotate.vocabulary())
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            'vocab_size': tokenizer.get_vocab_size() + 7,  # as published ones, it has spare rows
            'hidden_size': 48,
            'intermediate_size': 64,
            'num_hidden_layers': 4,
            'num_attention_heads': 2,
            'num_key_value_heads': 1,
            'initializer_range': 0.1,
            'rope_parameters': {'rope_type': 'default', 'mrope_section': [4, 4, 4]},
        },
        vision_config={
            'depth': 1,
            'embed_dim': 32,
            'hidden_size': 48,
            'num_heads': 2,
            'patch_size': 8,
        },
        image_token_id=tokenizer.token_to_id(prompt.IMAGE_PAD),
        tie_word_embeddings=True,
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save(str(folder / 'tokenizer.json'))
    return folder


@pytest.fixture(scope='module')
def checkpoint(qwen, tmp_path_factory):
    """Return the folder of the MoSE that was made of it and never trained."""
    out = tmp_path_factory.mktemp('checkpoint') / 'mose'
    convert.convert(qwen, out, settings=SETTINGS, taxonomy=SKILLS)
    return out


@pytest.fixture(scope='module')
def bundle(checkpoint, tmp_path_factory):
    """Return the folder of its bundle and the report of its parity, both by the command."""
    folder = tmp_path_factory.mktemp('models')
    report = folder / 'parity.json'
    options = ('--json', str(report), '--flow-steps', '4')
    assert run(checkpoint, folder / 'mose-qwen', *options) == 0
    return folder / 'mose-qwen', report


def run(checkpoint, out, *options):
    return command.main(['export', '--checkpoint', str(checkpoint), '--out', str(out), *options])


def contents(folder):
    return {path.name: sha256(path) for path in folder.iterdir()}


def test_a_qwen2vl_is_converted_and_exported_and_plans(bundle):
    folder, report = bundle
    policy = Policy.load(folder, threads=1)
    moment = fake_moments(policy.manifest.cameras, count=1)[0]
    plan = policy.plan(moment)
    assert plan.trajectory.xy.shape == (6, 2) and np.isfinite(plan.trajectory.xy).all()
    assert plan.views[0] == 'front' and len(plan.views) == 2
    assert plan.skills['planning'] in SKILLS.names('planning')
    assert isinstance(list(policy.reason())[-1], str)

    manifest = Manifest.load(folder)
    assert (manifest.name, manifest.precision) == ('mose-qwen', 'float32')
    assert manifest.num_steps == 4  # as asked for
    assert manifest.data == {'scales': 'defaults, as no data has trained this action expert: up to 15 m/s ahead, 3 m/s across'}  # fmt: skip
    assert manifest.action_high[-1] == [18.0, pytest.approx(3.6)]  # after 1.2 s
    found = json.loads(report.read_text(encoding='utf-8'))['parity']
    assert found == manifest.parity and set(PARITY) < set(found)
    assert found['text_equal'] and found['trajectory_max_m'] < 1e-3
    assert found['experts_reached'] == found['experts_total'] == 3 + 2


def test_a_bundle_that_differs_is_not_kept_and_the_report_says_why(
    bundle, qwen, tmp_path, monkeypatch, capsys
):
    folder, _ = bundle
    convert.convert(qwen, tmp_path / 'other', settings=SETTINGS, taxonomy=SKILLS, seed=1)

    def copy(network, partial, halve):  # the graphs of another network
        for name in [*(f'{graph}.onnx' for graph in GRAPHS), 'weights.bin']:
            shutil.copyfile(folder / name, partial / name)

    monkeypatch.setattr(export, 'write_graphs', copy)
    report = tmp_path / 'parity.json'
    assert run(tmp_path / 'other', tmp_path / 'models/new', '--json', str(report)) == 1
    said = capsys.readouterr().err
    assert 'differs from PyTorch, so it is not kept: trajectory_max_m' in said
    found = json.loads(report.read_text(encoding='utf-8'))['parity']
    assert set(PARITY) < set(found) and found['trajectory_max_m'] > 0.1
    assert list((tmp_path / 'models').iterdir()) == []


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_in_the_middle_leaves_the_old_bundle_and_no_half_one(
    bundle, checkpoint, tmp_path, number
):
    out = shutil.copytree(bundle[0], tmp_path / 'bundle')
    before, partial = contents(out), tmp_path / 'bundle.partial'
    arguments = ['export', '--checkpoint', str(checkpoint), '--out', str(out)]
    process = subprocess.Popen(
        [sys.executable, '-m', 'mose_ros.training', *arguments], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not (partial / 'view_router.onnx').exists():  # and weights; the others follow
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    assert contents(out) == before
    Manifest.load(out)
    if number == signal.SIGTERM:
        assert [path.name for path in tmp_path.iterdir()] == ['bundle']
    else:
        with pytest.raises(BundleError, match='is no bundle'):
            Manifest.load(partial)


def test_an_export_that_has_no_room_is_refused_at_once(checkpoint, tmp_path, monkeypatch, capsys):
    numbers = sum(p.numel() for p in MoseDriver.load(checkpoint).parameters())
    assert count_numbers(checkpoint) == numbers
    monkeypatch.setattr(MoseDriver, 'load', lambda _: pytest.fail('the weights were read'))
    with monkeypatch.context() as patch:
        patch.setattr(room.shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(9, 8, 10**7))
        assert run(checkpoint, tmp_path / 'out') == 1
    said = capsys.readouterr().err
    assert 'has 0.0 GB free, the bundle of 0.00 B parameters needs 0.0 GB; make room' in said
    (tmp_path / 'meminfo').write_text('MemTotal: 9 kB\nMemAvailable:   900000 kB\n')
    monkeypatch.setattr(room, 'MEMINFO', tmp_path / 'meminfo')
    assert run(checkpoint, tmp_path / 'out') == 1
    said = capsys.readouterr().err
    assert '0.9 GB of memory are available, the export of 0.00 B parameters needs 1.5 GB' in said
    assert [path.name for path in tmp_path.iterdir()] == ['meminfo']


def test_a_container_has_no_more_memory_than_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(room, 'CGROUP', tmp_path)
    free = room.available_memory()
    (tmp_path / 'memory.max').write_text('5000000\n')
    (tmp_path / 'memory.current').write_text('2000000\n')
    assert room.available_memory() == 3_000_000 < free
    (tmp_path / 'memory.max').write_text('max\n')
    assert room.available_memory() > 3_000_000


def test_a_checkpoint_says_what_it_lacks(checkpoint, tmp_path, drawn, capsys):
    training, data = drawn
    old = shutil.copytree(checkpoint, tmp_path / 'old')
    (old / FIT).unlink()
    assert run(old, tmp_path / 'out') == 1
    assert 'has no fit.json: it was made by an older version; name with --data' in said(capsys)
    asked = export.Asked(checkpoint=old, out=tmp_path, name='x', fit=Fit.to_data(data, training))
    fit = export._fit(asked)
    assert np.all(fit.action.high == 9) and fit.data['frames'] == 24
    assert run(checkpoint, tmp_path / 'out', '--set', 'data.top_k=2') == 1
    assert 'was trained otherwise: data.top_k: 1 -> 2' in said(capsys)

    mute = shutil.copytree(checkpoint, tmp_path / 'mute')
    (mute / 'tokenizer.json').unlink()
    assert run(mute, tmp_path / 'out') == 1
    assert 'tokenizer.json is missing; copy there the one of the Qwen2-VL' in said(capsys)
    prompt.word_tokenizer([f'word{n}' for n in range(999)]).save(str(mute / 'tokenizer.json'))
    assert run(mute, tmp_path / 'out') == 1
    assert 'is not the tokenizer of this network: it has 1067 tokens' in said(capsys)
    assert run(tmp_path / 'nowhere', tmp_path / 'out') == 1
    assert 'nowhere is missing; train it first' in said(capsys)
    assert not (tmp_path / 'out').exists()


def said(capsys):
    return capsys.readouterr().err


def test_expert_groups_keep_what_the_checkpoint_was_fitted_to(checkpoint, tmp_path):
    convert.widen(checkpoint, tmp_path / 'wide')
    assert Fit.load(tmp_path / 'wide') == Fit.load(checkpoint)
    assert (tmp_path / 'wide/tokenizer.json').is_file()

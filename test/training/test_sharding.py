"""Two processes with half of the weights each learn what one with all of them learns, from the same checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip('accelerate', reason='training is an extra: pip install mose_ros[train]')

from safetensors.torch import load_file  # noqa: E402

from mose_ros.modeling import config as modeling_config  # noqa: E402
from mose_ros.modeling.driver import MoseDriver  # noqa: E402
from mose_ros.training import checkpoints, journal, loop, sharding, stages, together  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import in_pieces  # noqa: E402

ROOT = Path(__file__).parents[2]
QUIET = loop.Limits(bar=False)
BLOCKS = 'DecoderLayer,Qwen2VLVisionBlock,JointLayer'


def told(folder, kind, *names):
    lines = (folder / journal.METRICS).read_text(encoding='utf-8').splitlines()
    found = [one[kind] for one in map(json.loads, lines) if kind in one]
    return [one[name] for one in found for name in names if name in one]


def launch(folder, data):
    """Run in_pieces.py by the launcher and the configuration that are shipped, on a CPU."""
    settings = yaml.safe_load((ROOT / 'config/accelerate/fsdp.yaml').read_text(encoding='utf-8'))
    config = folder / 'fsdp_cpu.yaml'
    config.write_text(yaml.safe_dump({**settings, 'use_cpu': True, 'num_processes': 2}))
    script = [str(ROOT / 'test/training/in_pieces.py'), str(data), str(folder)]
    subprocess.run(
        [
            sys.executable,
            '-m',
            'accelerate.commands.launch',
            '--config_file',
            str(config),
            *script,
        ],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        check=True,
        timeout=400,
    )


def test_two_halves_learn_what_a_whole_learns(drawn, tmp_path):
    _, data = drawn
    stages.train('router', in_pieces.run(), data, tmp_path / 'alone', limits=QUIET)
    stages.train('router', in_pieces.mixed(), data, tmp_path / 'mixed-alone', limits=QUIET)
    begun = loop.Limits(bar=False, stop_at=1)
    with pytest.raises(loop.Stopped):
        stages.train('router', in_pieces.run(), data, tmp_path / 'left', limits=begun)

    launch(tmp_path, data)

    alone = tmp_path / 'alone'
    names = ('loss', 'text', 'flow', 'view_router', 'action_router', 'gradient')
    assert told(tmp_path / 'straight', 'train', *names) == pytest.approx(
        told(alone, 'train', *names), rel=1e-4
    )
    assert told(tmp_path / 'straight', 'validation', 'loss', 'ade_m') == pytest.approx(
        told(alone, 'validation', 'loss', 'ade_m'), rel=1e-3
    )
    assert told(tmp_path / 'mixed', 'train', *names) == pytest.approx(
        told(tmp_path / 'mixed-alone', 'train', *names), rel=5e-3
    )
    other = told(tmp_path / 'other', 'train', 'loss')
    assert other != pytest.approx(told(alone, 'train', 'loss')[:1], rel=5e-3)

    held = [json.loads((tmp_path / f'held-{rank}.json').read_text()) for rank in (0, 1)]
    assert all(one['stopped'] for one in held)
    assert sum(one['here'] for one in held) == held[0]['whole']
    assert max(one['here'] for one in held) < 0.51 * held[0]['whole']

    # begun by one process, gone on in pieces, ended by one
    assert checkpoints.newest(tmp_path / 'left').name == f'{checkpoints.CHECKPOINT}0000002'
    stages.train('router', in_pieces.run(), data, tmp_path / 'left', limits=QUIET)
    assert told(tmp_path / 'left', 'train', 'loss') == pytest.approx(
        told(alone, 'train', 'loss'), rel=1e-4
    )
    models = [load_model(tmp_path / name) for name in ('alone', 'straight', 'left')]
    fresh = MoseDriver(stages.model_config(in_pieces.run(), data)).state_dict()
    for name, value in models[0].items():
        for model in models[1:]:
            assert (model[name] - value).abs().max() < 1e-3, name
    assert any((models[0][name] - fresh[name]).abs().max() > 2e-3 for name in fresh)


def load_model(folder):
    """Return the weights of a finished stage; their files are the same from whomever."""
    assert sorted(p.name for p in (folder / stages.MODEL).rglob('*.safetensors')) == [
        'driver.safetensors',
        'model.safetensors',
    ]
    assert load_file(folder / stages.MODEL / 'driver.safetensors')
    return MoseDriver.load(folder / stages.MODEL).state_dict()


def asked(monkeypatch, **settings):
    monkeypatch.setenv(together.FSDP, 'true')
    known = {'VERSION': '2', 'AUTO_WRAP_POLICY': 'TRANSFORMER_BASED_WRAP'}
    known |= {'TRANSFORMER_CLS_TO_WRAP': BLOCKS} | settings
    for name, value in known.items():
        monkeypatch.setenv(f'FSDP_{name}', value)
    return sharding.Sharding.asked()


def test_the_launcher_says_how(monkeypatch):
    assert sharding.Sharding.asked() is None
    found = asked(monkeypatch)
    assert found.reshard and list(found.blocks) == BLOCKS.split(',')
    driver = MoseDriver(modeling_config.preset('nano'))
    assert set(found.blocks) <= {type(module).__name__ for module in driver.modules()}
    assert not asked(monkeypatch, RESHARD_AFTER_FORWARD='false').reshard


@pytest.mark.parametrize(
    ('settings', 'said'),
    [
        ({'VERSION': '1'}, 'fsdp_version 1'),
        ({'OFFLOAD_PARAMS': 'true'}, 'fsdp_offload_params'),
        ({'ACTIVATION_CHECKPOINTING': 'true'}, 'gradient_checkpointing'),
        ({'AUTO_WRAP_POLICY': 'NO_WRAP'}, 'fsdp_transformer_layer_cls_to_wrap'),
    ],
)
def test_what_is_not_done_is_refused(settings, said, monkeypatch):
    with pytest.raises(ValueError, match=said):
        asked(monkeypatch, **settings)

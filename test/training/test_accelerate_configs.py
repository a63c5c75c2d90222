"""Accelerate reads every configuration that we ship, and each key of it means something to its launcher."""

from pathlib import Path

import pytest
import yaml

pytest.importorskip('accelerate', reason='training is an extra: pip install mose_ros[train]')

from accelerate.commands.config.config_args import load_config_from_file  # noqa: E402
from accelerate.commands.launch import _validate_launch_command, launch_command_parser  # noqa: E402

from mose_ros.modeling import config as modeling_config  # noqa: E402
from mose_ros.modeling.driver import MoseDriver  # noqa: E402
from mose_ros.training import together  # noqa: E402

FOLDER = Path(__file__).parents[2] / 'config' / 'accelerate'
KINDS = {'cpu': 'MULTI_GPU', 'fsdp': 'FSDP', 'deepspeed': 'DEEPSPEED'}
INNER = {'fsdp': 'fsdp_config', 'deepspeed': 'deepspeed_config'}


def launched(path):
    """Return what the launcher makes of a configuration; ValueError for a key that it does not know."""
    parser = launch_command_parser()
    arguments = parser.parse_args(['--config_file', str(path), 'train.py'])
    known = set(vars(arguments))
    for inner in INNER.values():
        strangers = set(getattr(load_config_from_file(str(path)), inner)) - known
        if strangers:
            raise ValueError(f'{path}: {inner} has unknown keys {sorted(strangers)}')
    arguments.nondefault = ()
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize('name', KINDS)
def test_a_shipped_configuration_loads(name):
    assert {path.stem for path in FOLDER.glob('*.yaml')} == set(KINDS)
    found = load_config_from_file(str(FOLDER / f'{name}.yaml'))
    assert found.distributed_type.value == KINDS[name]
    arguments = launched(FOLDER / f'{name}.yaml')
    assert arguments.num_processes == found.num_processes and arguments.num_machines == 1
    assert (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed) == tuple(
        KINDS[name] == kind for kind in ('MULTI_GPU', 'FSDP', 'DEEPSPEED')
    )


def test_the_launcher_gets_what_the_files_say():
    sharded = launched(FOLDER / 'fsdp.yaml')
    assert sharded.fsdp_version == 2 and sharded.fsdp_reshard_after_forward is True
    assert launched(FOLDER / 'deepspeed.yaml').zero_stage == 2
    driver = MoseDriver(modeling_config.preset('nano'))
    layers = {type(module).__name__ for module in driver.modules()}
    assert set(sharded.fsdp_transformer_layer_cls_to_wrap.split(',')) <= layers


@pytest.mark.parametrize('name', KINDS)
def test_a_key_that_means_nothing_is_refused(name, tmp_path):
    settings = yaml.safe_load((FOLDER / f'{name}.yaml').read_text(encoding='utf-8'))
    path = tmp_path / 'wrong.yaml'
    path.write_text(yaml.safe_dump({**settings, 'numprocesses': 2}), encoding='utf-8')
    with pytest.raises(ValueError, match='numprocesses'):
        launched(path)
    if name in INNER:
        settings[INNER[name]]['stage_of_zero'] = 2
        path.write_text(yaml.safe_dump(settings), encoding='utf-8')
        with pytest.raises(ValueError, match='stage_of_zero'):
            launched(path)


def test_a_stage_refuses_what_it_would_get_wrong(monkeypatch, tmp_path):
    monkeypatch.setenv(together.DEEPSPEED, 'true')
    with pytest.raises(ValueError, match='DeepSpeed is not supported'):
        together.join(tmp_path, device='cpu', bfloat16=False, accumulate=1)
    monkeypatch.setenv(together.DEEPSPEED, 'false')
    together.join(tmp_path, device='cpu', bfloat16=False, accumulate=1)

"""Two processes that share every batch learn what one learns from all of it, whoever launches them."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mose_ros.modeling.batch import LossWeights
from mose_ros.modeling.driver import MoseDriver
from mose_ros.training import checkpoints, journal, loop, stages, together
from mose_ros.training.batches import Order, load
from mose_ros.training.index import Index
from mose_ros.training.samples import Samples

ROOT = Path(__file__).parents[2]
WEIGHTS = {'text': 1.0, 'routers': 0.5, 'flow': 1.0, 'action_router': 1.0, 'view_router': 1.0}
EVERYTHING = LossWeights(**WEIGHTS)
LAUNCHERS = {
    'accelerate': ['accelerate.commands.launch', '--config_file', 'config/accelerate/cpu.yaml'],
    'torchrun': ['torch.distributed.run', '--standalone', '--nproc-per-node', '2'],
}


@pytest.fixture
def run(drawn):
    """Return a nano run whose first stage learns everything at once, in three steps, and its data."""
    training, data = drawn
    stage = replace(training.router, losses=EVERYTHING, steps=3, batch_size=8, validate_every=9)
    return replace(training, router=stage), data


def losses(folder):
    lines = (folder / journal.METRICS).read_text(encoding='utf-8').splitlines()
    return {
        name: [json.loads(line)['train'][name] for line in lines if 'train' in line]
        for name in ('loss', 'text', 'view_router', 'action_router', 'flow', 'gradient')
    }


def quiet(**limits):
    return stages.Limits(bar=False, **limits)


def launch(launcher, work, data, *settings):
    """Start the first stage in two processes; they are the group of what is returned."""
    settings = [*(f'losses.{name}={weight}' for name, weight in WEIGHTS.items()), *settings]
    verb = ['-m', 'mose_ros.training', 'router', '--preset', 'nano', '--quiet']
    verb += ['--work', str(work), '--data', str(data), '--set', 'router.batch_size=8']
    verb += [word for setting in settings for word in ('--set', f'router.{setting}')]
    return subprocess.Popen(
        [sys.executable, '-m', *LAUNCHERS[launcher], *verb],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        start_new_session=True,
    )


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_two_processes_move_as_one(launcher, run, tmp_path):
    training, data = run
    stages.train('router', training, data, tmp_path / 'alone', limits=quiet())
    shared = tmp_path / 'shared' / 'router'
    if launcher == 'torchrun':  # a checkpoint does not know how many processes go on with it
        with pytest.raises(loop.Stopped):
            stages.train('router', training, data, shared, limits=quiet(stop_at=1))
    started = launch(launcher, shared.parent, data, 'steps=3', 'validate_every=9')
    assert started.wait(timeout=240) == 0
    alone, both = losses(tmp_path / 'alone'), losses(shared)
    for name in alone:  # Adam makes much of the last bits of a gradient that is nearly 0
        assert both[name][0] == pytest.approx(alone[name][0], rel=1e-5), name
        assert both[name] == pytest.approx(alone[name], rel=3e-3), name
    assert len(set(alone['loss'])) == 3, 'the loss moves, or equality would say nothing'


def test_parts_of_a_batch_count_by_what_they_know(run):
    training, data = run
    config = stages.model_config(training, data)
    index = Index.load(data, config)
    samples = Samples(index, config, training.data)
    order = list(Order(index, training.data, stage='sft', seed=0, batch=8, start=0, stop=1))
    whole = next(load(samples, order, 0)).batch
    halves = [one.batch for one in load(samples, together.deal(order, 2), 0)]
    torch.manual_seed(0)
    driver = MoseDriver(config)
    expected = driver(whole, EVERYTHING).loss
    shares = together.agree(Accelerator(cpu=True), halves).shares
    found = [
        driver(half, together.weigh(EVERYTHING, share)).loss
        for half, share in zip(halves, shares, strict=True)
    ]
    torch.testing.assert_close(torch.stack(found).mean(), expected, rtol=2e-6, atol=0)
    plain = torch.stack([driver(half, EVERYTHING).loss for half in halves]).mean()
    assert abs(plain - expected) > 2e-4


def test_accumulating_changes_nothing(run, tmp_path):
    training, data = run
    cut = replace(training, router=replace(training.router, accumulate=2))
    for name, one in {'whole': training, 'cut': cut}.items():
        stages.train('router', one, data, tmp_path / name, limits=quiet())
    cut, whole = losses(tmp_path / 'cut'), losses(tmp_path / 'whole')
    assert cut['loss'] == pytest.approx(whole['loss'], rel=3e-3)
    assert cut['gradient'][0] == pytest.approx(whole['gradient'][0], rel=1e-4)


def terminate_twice(started):
    """As `timeout torchrun ...` does: it tells its child, then the whole group, which the child is in."""
    started.terminate()
    time.sleep(0.05)
    started.terminate()


def interrupt(started):
    """As a terminal does at Ctrl-C."""
    os.killpg(started.pid, signal.SIGINT)


def test_two_processes_that_are_stopped_lose_nothing(drawn, tmp_path):
    _, data = drawn
    settings = ['steps=24', 'checkpoint_every=99', 'validate_every=99', 'validate_samples=4']
    assert launch('torchrun', tmp_path / 'straight', data, *settings).wait(timeout=240) == 0
    folder, done = tmp_path / 'left' / 'router', 0
    for stop in (terminate_twice, interrupt):
        started = launch('torchrun', tmp_path / 'left', data, *settings)
        until(lambda: steps(folder) > done + 2, started)  # noqa: B023
        stop(started)
        assert started.wait(timeout=60) != 0
        done = steps(folder)
        assert checkpoints.newest(folder).name == f'{checkpoints.CHECKPOINT}{done:07d}'
        assert done < 24
    assert launch('torchrun', tmp_path / 'left', data, *settings).wait(timeout=240) == 0
    assert steps(folder) == 24
    assert losses(folder) == losses(tmp_path / 'straight' / 'router')


def steps(folder):
    """Return the last step that the stage told of."""
    path = folder / journal.METRICS
    lines = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
    return json.loads(lines[-1])['step'] if lines else 0


def until(true, started):
    end = time.monotonic() + 120
    while not true():
        assert started.poll() is None, 'it ended by itself'
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_interrupt_ends_after_a_whole_step(run, tmp_path, monkeypatch):
    training, data = run
    log = loop.Loop._log

    def interrupt(loop, shown):
        if loop.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return log(loop, shown)

    stages.train('router', training, data, tmp_path / 'straight', limits=quiet())
    monkeypatch.setattr(loop.Loop, '_log', interrupt)
    with pytest.raises(KeyboardInterrupt):
        stages.train('router', training, data, tmp_path / 'left', limits=quiet())
    assert checkpoints.newest(tmp_path / 'left').name == f'{checkpoints.CHECKPOINT}0000001'
    stages.train('router', training, data, tmp_path / 'left', limits=quiet())
    assert losses(tmp_path / 'left') == losses(tmp_path / 'straight')
    board = EventAccumulator(str(tmp_path / 'left' / 'tensorboard')).Reload()
    shown = [event.value for event in board.Scalars('train/loss')]
    assert shown == pytest.approx(losses(tmp_path / 'left')['loss'])


def test_a_batch_that_does_not_divide_is_refused():
    assert list(together.deal([[1, 2, 3]], 2)) == [[1, 3], [2]]
    assert list(together.deal([[1, 2, 3]], 2, rank=1, size=2)) == [[2]]
    with pytest.raises(ValueError, match='batch of 3 does not divide among 4'):
        next(together.deal([[1, 2, 3]], 4))


def test_the_device_that_is_asked_for_is_taken_or_refused(tmp_path, monkeypatch):
    def join(device):
        return together.join(tmp_path, device=device, bfloat16=False, accumulate=1).device

    assert join('cpu').type == 'cpu'
    taken = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', taken.append)
    with monkeypatch.context() as there:
        cuda = SimpleNamespace(device=torch.device('cuda'))
        there.setattr(together, 'Accelerator', lambda **_: cuda)
        join('cuda')
        assert not taken
        join('cuda:1')
        assert taken == [torch.device('cuda:1')]
        there.setattr(
            together, 'Accelerator', lambda **_: SimpleNamespace(device=torch.device('cpu'))
        )
        with pytest.raises(ValueError, match='--device cuda: this machine has cpu only'):
            join('cuda')
    with pytest.raises(ValueError, match='--device cuda:2: torch sees 2 GPUs, counted from 0'):
        join('cuda:2')
    with pytest.raises(ValueError, match="--device 'gpu': expected cpu, cuda or cuda:N"):
        join('gpu')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='each takes a GPU of its own; say --device cuda'):
        join('cuda:1')

"""Whenever a stage ends, by whatever means, the same command goes on from a whole checkpoint."""

import json

import pytest

torch = pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')

from mose_ros.training import checkpoints, journal, loop, stages  # noqa: E402


@pytest.fixture
def stopped(drawn, tmp_path):
    """Return what continues a stage of two steps that was stopped after the first, and its folder."""
    training, data = drawn
    folder = tmp_path / 'run'

    def go_on(**limits):
        limits = stages.Limits(bar=False, **limits)
        return stages.train('router', training, data, folder, limits=limits)

    with pytest.raises(loop.Stopped):
        go_on(stop_at=1)
    return go_on, folder


def test_a_stop_before_the_next_step_leaves_the_checkpoint_that_is_there(stopped, monkeypatch):
    go_on, folder = stopped
    found = checkpoints.newest(folder)
    weights = (found / 'model.safetensors').stat()

    def killed(*_):
        raise OSError('killed on the way')

    monkeypatch.setattr(loop.Loop, '_train_step', lambda *_: None)  # it is to leave at once
    monkeypatch.setattr(checkpoints.shutil, 'rmtree', killed)
    with pytest.raises(KeyboardInterrupt):
        go_on()
    monkeypatch.undo()
    assert checkpoints.newest(folder) == found
    assert (found / 'model.safetensors').stat().st_mtime_ns == weights.st_mtime_ns
    assert checkpoints.read_state(found)['step'] == 1
    assert go_on().is_dir() and checkpoints.newest(folder) is None, 'it is done'


def lines(folder):
    return (folder / journal.METRICS).read_text(encoding='utf-8').splitlines()


def test_a_torn_last_line_is_dropped_and_told(stopped, caplog):
    go_on, folder = stopped
    whole = lines(folder)
    with (folder / journal.METRICS).open('a', encoding='utf-8') as file:
        file.write('{"step": 2, "sec')
    go_on()
    assert 'dropped its last line, which is torn' in caplog.text
    now = lines(folder)
    assert now[: len(whole)] == whole and len(now) > len(whole)
    assert all(map(json.loads, now))


def test_a_torn_line_among_whole_ones_is_named(stopped):
    go_on, folder = stopped
    text = '\n'.join(['{"step": 1, "sec', *lines(folder)])
    (folder / journal.METRICS).write_text(text + '\n', encoding='utf-8')
    with pytest.raises(ValueError, match='metrics.jsonl: line 1 is none of ours'):
        go_on()
    assert (folder / journal.METRICS).read_text(encoding='utf-8') == text + '\n'

"""Samples that can't be read are named, counted and skipped; training goes on without them."""

import json
import logging
from dataclasses import replace

import pytest

torch = pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')

from mose_ros.training import annotate, loop, stages  # noqa: E402
from mose_ros.training.batches import Order, load  # noqa: E402
from mose_ros.training.index import Index  # noqa: E402
from mose_ros.training.samples import Samples  # noqa: E402

FRONT = 'merging_00001/camera/rgb_front/{:05d}.jpg'  # of the training clips; 6 and 7 are the last


@pytest.fixture
def run(drawn):
    training, data = drawn
    stage = replace(training.router, steps=4, batch_size=8, validate_every=9, checkpoint_every=9)
    held = replace(training.data, validation_share=0.3)
    return replace(training, router=stage, data=held), data


def train(training, data, folder, **limits):
    stages.train('router', training, data, folder, limits=stages.Limits(bar=False, **limits))
    return json.loads((folder / stages.RESULT).read_text(encoding='utf-8'))


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize('workers', [0, 2])
def test_a_cut_off_picture_is_named_and_counted_and_training_goes_on(
    run, tmp_path, caplog, workers
):
    training, data = run
    training = replace(training, data=replace(training.data, workers=workers))
    cut(data / FRONT.format(6))
    (data / FRONT.format(7)).unlink()
    labels = data / 'normal_00000' / annotate.LABELS
    lines = labels.read_text(encoding='utf-8').splitlines()
    labels.write_text('\n'.join([*lines[:-1], lines[-1][:40]]) + '\n', encoding='utf-8')
    with caplog.at_level(logging.WARNING):
        found = train(training, data, tmp_path / 'run')
    corrupt = found['corrupt']
    bad = {FRONT.format(6), FRONT.format(7), f'normal_00000/{annotate.LABELS}:9'}
    assert set(corrupt['samples']) == bad and corrupt['count'] >= 3
    assert found['steps'] == 4
    assert all(name in caplog.text for name in bad) and 'it is cut off' in caplog.text


def test_whole_data_has_nothing_to_tell_and_a_stop_forgets_nothing(run, tmp_path):
    training, data = run
    assert train(training, data, tmp_path / 'whole')['corrupt'] == {'count': 0, 'samples': {}}
    for frame in (6, 7):
        cut(data / FRONT.format(frame))
    straight = train(training, data, tmp_path / 'straight')
    with pytest.raises(loop.Stopped):
        train(training, data, tmp_path / 'stopped', stop_at=2)
    assert train(training, data, tmp_path / 'stopped')['corrupt'] == straight['corrupt']
    assert straight['corrupt']['count'] > 0


def test_data_that_cannot_be_read_at_all_ends_the_training(run, tmp_path):
    training, data = run
    for path in data.glob('*/camera/rgb_front/*.jpg'):
        path.write_bytes(b'')
    with pytest.raises(ValueError, match='4 samples in a row cannot be read.*rgb_front'):
        train(training, data, tmp_path / 'run')


def test_only_samples_that_cannot_be_read_are_replaced(run):
    training, data = run
    config = stages.model_config(training, data)
    index = Index.load(data, config)
    samples = Samples(index, config, training.data)
    keys = next(iter(Order(index, training.data, stage='sft', seed=0, batch=8, start=0, stop=1)))
    before = next(load(samples, [keys], 0))
    first = keys[0].frame
    name = f'{index.clips[index.clip[first]]}/camera/rgb_front/{index.frame[first]:05d}.jpg'
    cut(data / name)
    after = next(load(samples, [keys], 0))
    assert not before.corrupt and set(after.corrupt) == {name}
    changed = [  # a frame is seen twice: as itself, and as the older one of a later frame
        i
        for i, frame in enumerate(key.frame for key in keys)
        if index.clip[frame] == index.clip[first]
        and index.frame[first] in (index.frame[frame], index.older[frame])
    ]
    assert 0 < len(changed) < 8
    for i in range(8):
        same = torch.equal(before.batch.action[i], after.batch.action[i])
        assert same == (i not in changed)

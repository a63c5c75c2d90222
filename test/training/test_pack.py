"""Clips in shards are the clips in their folder, wherever the shards lie; what can't be had is named and counted."""

import gzip
import json
import os
import shutil
import tarfile
from dataclasses import fields, is_dataclass, replace

import cv2
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')
fsspec = pytest.importorskip('fsspec', reason='training is an extra: pip install mose_ros[train]')
pytest.importorskip('aiohttp', reason='training is an extra: pip install mose_ros[train]')

from mose_ros.data import shards, storage  # noqa: E402
from mose_ros.data.cache import Cache  # noqa: E402
from mose_ros.data.clips import find_clips  # noqa: E402
from mose_ros.training import __main__ as command  # noqa: E402
from mose_ros.training import annotate, collect, journal, loop, pack, stages  # noqa: E402
from mose_ros.training.batches import Order, Window, load, validation_keys  # noqa: E402
from mose_ros.training.config import Collect  # noqa: E402
from mose_ros.training.index import Index  # noqa: E402
from mose_ros.training.samples import Samples  # noqa: E402
from test.data.file_server import FileServer  # noqa: E402

ONE_EACH = 0.001  # MB of a shard: each clip has one of its own
CLIPS, FRAMES = 6, 8


@pytest.fixture
def run(drawn):
    """Return a nano run that learns of classes too, and the folder of six clips of eight frames each."""
    training, data = drawn
    for number in range(CLIPS - 3):
        shutil.copytree(data / f'merging_{number:05d}', data / f'merging_{number + 2:05d}')
    for frame in range(FRAMES):
        path = data / f'merging_00003/anno/{frame:05d}.json.gz'
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(b'{"bounding_boxes": [{}]}', mtime=0))
    classes = data / 'merging_00003/camera/semantic_front'
    classes.mkdir()
    cv2.imwrite(str(classes / '00005.png'), np.full((36, 64), 3, np.uint8))
    model = replace(training.model, semantic_classes=14)
    stage = replace(training.router, steps=4, batch_size=8, validate_every=3, log_every=1)
    held = replace(training.data, validation_share=0.2, workers=0)
    return replace(training, model=model, router=stage, data=held), data


@pytest.fixture
def packed(run, tmp_path):
    """Return where the same clips lie as six shards."""
    pack.pack(run[1], tmp_path / 'packed', shard_mb=ONE_EACH, bar=False)
    return tmp_path / 'packed'


@pytest.fixture
def memory():
    files = fsspec.filesystem('memory')
    yield files
    files.rm('/', recursive=True)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / 'cache', pause=0.0)


def batches(training, root, stop=6, **options):
    """Return what a training would see of a data set, and would be judged with."""
    config = stages.model_config(training, root)
    index = Index.load(root, config)
    samples = Samples(index, config, training.data)
    order = Order(
        index, training.data, stage='sft', seed=3, batch=4, start=0, stop=stop, **options
    )
    keys = [*order, *validation_keys(index, training.data, 4, 2)]
    return list(load(samples, keys, training.data.workers))


def flat(value):
    """Return everything in a batch as a list of bytes."""
    if is_dataclass(value):
        return [one for field in fields(value) for one in flat(getattr(value, field.name))]
    return [value.numpy().tobytes() if torch.is_tensor(value) else repr(value).encode()]


def everything(loaded):
    return [part for one in loaded for part in flat(one)]


def train(training, data, folder, **limits):
    stages.train('router', training, data, folder, limits=loop.Limits(bar=False, **limits))
    return json.loads((folder / stages.RESULT).read_text(encoding='utf-8'))


def curve(folder):
    lines = map(json.loads, (folder / journal.METRICS).read_text().splitlines())
    return [one['train']['loss'] for one in lines if 'train' in one]


@pytest.mark.parametrize('choice', ['label', 'router'])
def test_shards_give_the_samples_of_the_folder(run, packed, choice):
    training, data = run
    for frame in (3, 4, 5):
        (data / f'normal_00000/camera/rgb_back/{frame:05d}.jpg').write_bytes(b'cut')
    repacked = packed.with_name('again')
    pack.pack(data, repacked, shard_mb=100.0, bar=False)
    plain = batches(training, data, view_choice=choice)
    assert any(one.corrupt for one in plain), 'what is broken is broken in the shard as well'
    assert everything(plain) == everything(batches(training, repacked, view_choice=choice))
    assert everything(plain) != everything(batches(training, packed, view_choice=choice)), 'whole'


def test_a_url_gives_the_samples_of_the_folder_packed_or_not(run, packed, memory, cache):
    training, data = run
    plain = everything(batches(training, data, stop=3))
    for number, folder in enumerate((data, packed)):
        memory.put(str(folder), f'/bucket/{number}', recursive=True)
        there = storage.place(f'memory://bucket/{number}', cache)
        assert everything(batches(training, there, stop=3)) == plain
    with FileServer(packed) as server:
        threads = replace(training, data=replace(training.data, workers=2))
        there = storage.place(server.url, Cache(cache.folder.with_name('other')))
        assert everything(batches(threads, there, stop=3)) == plain
        asked = [path for path in server.requests if path.endswith('.tar')]
        assert len(asked) == len(set(asked)) == CLIPS, 'each once'


def test_a_small_cache_changes_nothing_but_the_traffic(run, packed, cache):
    training, data = run
    largest = max(path.stat().st_size for path in packed.glob('*.tar'))
    small = Cache(cache.folder, limit=int(2.5 * largest), pause=0.0)
    with FileServer(packed) as server:
        found = batches(training, storage.place(server.url, small), stop=3)
        assert len([path for path in server.requests if path.endswith('.tar')]) > CLIPS
    assert everything(found) == everything(batches(training, data, stop=3))
    assert sum(path.stat().st_size for path in small.folder.iterdir()) <= small.limit


def test_the_same_clips_give_the_same_bytes(run, packed, tmp_path):
    _, data = run
    copy = tmp_path / 'copy'
    shutil.copytree(data, copy, copy_function=shutil.copy)  # other times
    for path in copy.rglob('*.jpg'):
        os.utime(path, (1, 1))
        path.chmod(0o600)
    pack.pack(copy, tmp_path / 'again', shard_mb=ONE_EACH, bar=False)
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / 'again').iterdir()} == before
    assert len(before) == 2 * CLIPS + 3
    with tarfile.open(packed / 'shard-00001.tar') as tar:
        names = tar.getnames()
        assert names == sorted(names)
        for name in names:
            assert tar.extractfile(name).read() == (data / name).read_bytes()
    picture = copy / 'normal_00000/camera/rgb_back/00000.jpg'
    picture.write_bytes(picture.read_bytes()[:-2] + b'\0\xff\xd9')
    pack.pack(copy, tmp_path / 'third', shard_mb=ONE_EACH, bar=False)
    changed = [one for one in before if (tmp_path / 'third' / one).read_bytes() != before[one]]
    assert len(changed) == 3, 'its shard, its table and the index'


@pytest.mark.parametrize('where', ['folder', 'bucket'])
def test_a_stopped_packing_goes_on(run, packed, tmp_path, memory, monkeypatch, where):
    _, data = run
    out = 'memory://bucket/out' if where == 'bucket' else tmp_path / 'out'
    write, written = shards.write_shard, []

    def stop_in_the_third(path, *arguments, **options):
        if len(written) == 2:
            path.write_bytes(b'half')
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, *arguments, **options)

    monkeypatch.setattr(shards, 'write_shard', stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        pack.pack(data, out, shard_mb=ONE_EACH, bar=False)
    # nobody takes what is there for the whole
    assert not (storage.place(out) / shards.INDEX).is_file()
    written.clear()
    monkeypatch.setattr(shards, 'write_shard', lambda path, *more, **options: (written.append(path.name), write(path, *more, **options))[1])  # fmt: skip
    pack.pack(data, out, shard_mb=ONE_EACH, bar=False)
    assert len(written) == CLIPS - 2
    for path in packed.iterdir():
        found = memory.cat(f'/bucket/out/{path.name}') if where == 'bucket' else (out / path.name).read_bytes()  # fmt: skip
        assert found == path.read_bytes()
    written.clear()
    pack.pack(data, out, shard_mb=ONE_EACH, bar=False)
    assert not written, 'all is there'


def test_other_shards_are_not_overwritten(run, packed):
    _, data = run
    for size in (100.0, ONE_EACH):
        with pytest.raises(ValueError, match='holds other shards, or not all'):
            if size == ONE_EACH:
                (packed / 'shard-00002.tar').unlink()
            pack.pack(data, packed, shard_mb=size, bar=False)
    (packed / shards.INDEX).unlink()
    pack.pack(data, packed, shard_mb=ONE_EACH, bar=False)
    assert (packed / 'shard-00002.tar').is_file()


def test_what_is_not_annotated_is_left_out_and_told(run, tmp_path, caplog):
    _, data = run
    with pytest.raises(ValueError, match='is the data itself'):
        pack.pack(data, f'file://{data}', bar=False)
    (data / 'normal_00000/anno').mkdir()
    (data / 'normal_00000/anno/00000.json.gz').touch()
    (data / 'normal_00000' / annotate.LABELS).unlink()
    index = pack.pack(data, tmp_path / 'out', bar=False)
    assert len(index.shards) == 1 and len(index.shards[0].clips) == CLIPS - 1
    assert 'left out 1 clips without labels: normal_00000' in caplog.text
    (data / annotate.DATASET).unlink()
    with pytest.raises(ValueError, match='holds no dataset.json; run .* annotate'):
        pack.pack(data, tmp_path / 'other', bar=False)


def test_clips_in_folders_of_scenarios_are_clips(run, tmp_path):
    training, data = run
    (data / 'LaneChange').mkdir()
    (data / 'merging_00003').rename(data / 'LaneChange/Town03_Route1')
    (data / 'notes').mkdir()  # no clip
    pack.pack(data, tmp_path / 'packed', shard_mb=ONE_EACH, bar=False)
    there = storage.place(tmp_path / 'packed')
    clips = Index.load(there, stages.model_config(training, there)).clips
    assert clips[0] == 'LaneChange/Town03_Route1' and len(clips) == CLIPS
    assert [one.path for one in find_clips(there)] == [clips[0]]  # the others have no annotation
    assert storage.names(there / 'LaneChange') == ['Town03_Route1'] != storage.names(there)
    assert 'LaneChange' in storage.names(there) and storage.names(there / 'Lane') == []
    assert everything(batches(training, there)) == everything(batches(training, data))


def test_clips_for_validation_share_the_first_shards(run, packed):
    training, _ = run
    index = Index.load(packed, stages.model_config(training, packed))
    for share in (0.2, 0.5):
        config = replace(training.data, validation_share=share)
        held, seen = (set(index.clip[index.split(side, config)]) for side in (True, False))
        assert max(index.shard[clip] for clip in held) < min(index.shard[clip] for clip in seen)


def window(shards_=20, heads=4, batch=8, seed=0, frames=2000):
    random = np.random.default_rng(0)
    of = np.sort(random.integers(0, shards_, frames)) * 3  # 0, 3, 6 ...: some have no such frame
    chances = random.random(frames) ** 2 + 0.01
    return of, chances / chances.sum(), Window(chances / chances.sum(), of, heads, batch, (seed,))


def test_a_step_draws_from_few_shards_and_an_epoch_from_all():
    of, _, one = window()
    steps = round(2000 / 8)
    drawn = [set(of[one.places(step, np.random.default_rng(step).random((4, 8)))].ravel()) for step in range(steps)]  # fmt: skip
    assert all(drawn[step] <= set(one.shards(step)) for step in range(steps))
    assert max(len(one.shards(step)) for step in range(3 * steps)) <= 4
    assert set().union(*drawn) == set(of.tolist())
    arrivals = sum(len(set(one.shards(s + 1)) - set(one.shards(s))) for s in range(steps - 1))
    assert arrivals <= 20 + 4, 'a shard is fetched about once in an epoch'


def test_the_window_follows_from_seed_and_step():
    of, _, one = window()
    draws = np.random.default_rng(0).random((4, 8))
    assert np.array_equal(one.places(77, draws), window()[2].places(77, draws))
    assert not np.array_equal(one.places(77, draws), window(seed=1)[2].places(77, draws))
    assert one.shards(0) != one.shards(250), 'each epoch has an order of its own'
    first, *spares = of[one.places(77, draws)]
    assert (spares[0] != first).all(), 'another shard stands in for a broken one'


def test_in_the_long_run_a_frame_comes_as_often_as_from_all_shards():
    of, chances, one = window()
    random = np.random.default_rng(1)
    steps = range(0, 250 * 100, 7)
    places = np.concatenate([one.places(s, random.random((1, 40)))[0] for s in steps])
    counts = np.bincount(of[places] // 3, minlength=20)
    expected = np.bincount(of // 3, chances, minlength=20)
    np.testing.assert_allclose(counts / counts.sum(), expected, atol=0.004)
    often, seldom = chances > np.quantile(chances, 0.9), chances < np.quantile(chances, 0.5)
    assert np.isin(places, np.flatnonzero(often)).mean() == pytest.approx(chances[often].sum(), abs=0.01)  # fmt: skip
    assert np.isin(places, np.flatnonzero(seldom)).mean() == pytest.approx(chances[seldom].sum(), abs=0.01)  # fmt: skip


def test_few_shards_at_once_need_few_on_the_disk(run, packed, cache):
    training, data = run
    training = replace(training, data=replace(training.data, shards_at_once=2))
    config = stages.model_config(training, data)
    index = Index.load(packed, config)
    keys = list(Order(index, training.data, stage='sft', seed=0, batch=4, start=0, stop=30))
    places = [[f for key in batch for f in (key.frame, *key.spares)] for batch in keys]
    used = [{index.shard[clip] for clip in index.clip[frames]} for frames in places]
    learned = {index.shard[i] for i in index.clip[index.split(False, training.data)]}
    assert max(map(len, used)) == 2 and set().union(*used) == learned and len(learned) == 4
    assert keys[11:] == list(
        Order(index, training.data, stage='sft', seed=0, batch=4, start=11, stop=30)
    )
    for enough in (4, 99):  # as many as there are
        config = replace(training.data, shards_at_once=enough)
        all_ = list(Order(index, config, stage='sft', seed=0, batch=4, start=0, stop=9))
        assert (
            all_
            == list(Order(index, run[0].data, stage='sft', seed=0, batch=4, start=0, stop=9))
            != keys[:9]
        )


def test_shards_at_once_are_two_at_least_and_of_packed_data(run, packed, caplog):
    training, data = run
    model = stages.model_config(training, data)
    one, two = (replace(training.data, shards_at_once=number) for number in (1, 2))
    with pytest.raises(ValueError, match='0 .all. or at least 2, not 1'):
        Order(Index.load(packed, model), one, stage='sft', seed=0, batch=4, start=0, stop=1)
    index = Index.load(data, model)
    keys = list(Order(index, two, stage='sft', seed=0, batch=4, start=0, stop=3))
    assert keys == list(Order(index, training.data, stage='sft', seed=0, batch=4, start=0, stop=3))
    assert 'of no account' in caplog.text


def test_a_run_goes_on_from_shards_where_it_stopped(run, packed, cache, tmp_path):
    training, data = run
    straight = train(training, data, tmp_path / 'straight')
    with pytest.raises(loop.Stopped):
        train(training, data, tmp_path / 'stopped', stop_at=2)
    with FileServer(packed) as server:
        there = storage.place(server.url, cache)
        assert train(training, there, tmp_path / 'stopped')['identity'] == straight['identity']
    assert curve(tmp_path / 'stopped') == curve(tmp_path / 'straight')
    few = replace(training, data=replace(training.data, shards_at_once=2))
    train(few, packed, tmp_path / 'few')
    assert curve(tmp_path / 'few') != curve(tmp_path / 'straight')
    with pytest.raises(loop.Stopped):
        train(few, packed, tmp_path / 'few in two', stop_at=1)
    train(few, packed, tmp_path / 'few in two')
    assert curve(tmp_path / 'few in two') == curve(tmp_path / 'few')


@pytest.mark.parametrize('fault', ['cut', 'gone'])
def test_a_shard_that_cannot_be_had_is_named_and_counted(
    run, packed, cache, tmp_path, fault, caplog
):
    training, _ = run
    training = replace(training, data=replace(training.data, shards_at_once=3))
    bad = packed / 'shard-00004.tar'
    with FileServer(packed) as server:
        if fault == 'cut':
            server.cuts['/shard-00004.tar'] = 99
        else:
            bad.unlink()
        found = train(training, storage.place(server.url, cache), tmp_path / 'run')
    assert found['steps'] == 4
    assert list(found['corrupt']['samples']) == ['shard-00004.tar']
    assert found['corrupt']['count'] > 1
    assert caplog.text.count('shard-00004.tar cannot be used') == 1
    assert ('missing' in caplog.text) == (fault == 'gone')


def test_shards_that_cannot_be_had_at_all_end_the_training(run, packed, cache, tmp_path):
    for path in packed.glob('*.tar'):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match='4 samples in a row cannot be read.*shard-'):
        train(run[0], packed, tmp_path / 'run')
    next(packed.glob('shard-*.json.gz')).write_bytes(b'no table')
    with pytest.raises((ValueError, OSError), match='shard-.*json.gz|bytes instead'):
        train(run[0], packed, tmp_path / 'other')


def test_the_commands(run, memory, tmp_path, capsys, caplog):
    _, data = run
    caplog.set_level('INFO')
    arguments = ['--preset', 'nano', '--quiet', '--work', str(tmp_path / 'work')]
    bucket = ['--data', 'memory://bucket/data', '--cache', str(tmp_path / 'cache')]
    out = ['--out', 'memory://bucket/data', '--shard-mb', str(ONE_EACH)]
    assert command.main(['pack', *arguments, '--data', str(data), *out]) == 0
    assert '6 clips in 6 shards' in caplog.text
    assert command.main(['router', *arguments, *bucket, '--set', 'data.shards_at_once=2']) == 0
    assert (tmp_path / 'work/router' / stages.RESULT).is_file()
    assert command.main(['analyse', 'chains', *arguments, *bucket, '--clip', 'merging_00003']) == 0
    chains = json.loads((tmp_path / 'work/analysis/chains.json').read_text())
    assert len(chains['frames']) == FRAMES
    again = ['router', *arguments[:-1], str(tmp_path / 'full'), *bucket]
    assert command.main([*again, '--cache-gb', '0.0008']) == 0
    assert 'are fetched again and again' in caplog.text.replace('\n', ' ')
    capsys.readouterr()
    for verb in ('collect', 'annotate'):
        assert command.main([verb, *arguments, *bucket[:2]]) == 1
        assert f'{verb} writes to a local folder' in capsys.readouterr().err
    assert command.main(['export', *arguments, *bucket, '--out', 's3://bucket/bundle']) == 1
    assert 'writes to local folders, not to s3://bucket/bundle' in capsys.readouterr().err
    assert command.main(['pack', *arguments, '--data', str(data)]) == 1
    assert 'say with --out' in capsys.readouterr().err
    with pytest.raises(ValueError, match='collect writes to a local folder'):
        collect.collect(Collect(), 's3://bucket/data', bar=False)

"""Clips are read alike from a folder, from one that fsspec reaches, and from shards in either."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from mose_ros.data import bench2drive, shards, storage
from mose_ros.data.cache import Cache
from mose_ros.data.clips import ClipReader, find_clips
from test.data.file_server import FileServer
from test.data.test_clips import write_clip

CLIPS = ('merging_00001', 'normal_00000')


@pytest.fixture
def clips(tmp_path):
    """Return a folder of two clips, and something else."""
    root = tmp_path / 'clips'
    write_clip(root / CLIPS[0], count=3)
    shutil.copytree(root / CLIPS[0], root / CLIPS[1])
    (root / CLIPS[1] / 'anno' / '00002.json.gz').unlink()
    (root / 'notes.txt').write_text('not a clip')
    return root


@pytest.fixture
def packed(clips, tmp_path):
    """Return the same clips as two shards, written by hand."""
    out, found = tmp_path / 'packed', []
    out.mkdir()
    for number, clip in enumerate(CLIPS):
        tar, table = out / f'{number}.tar', out / f'{number}.json.gz'
        names = [p.relative_to(clips).as_posix() for p in (clips / clip).rglob('*') if p.is_file()]
        table.write_bytes(shards.write_shard(tar, clips, names, at_once='', made_of=''))
        whole = {'tar': shards.Whole.of(tar), 'table': shards.Whole.of(table)}
        found.append(shards.Shard(**whole, clips=(clip,)))
    shutil.copy(clips / 'notes.txt', out)
    files = (shards.Whole.of(out / 'notes.txt'),)
    index = shards.Index(shards=tuple(found), files=files)
    (out / shards.INDEX).write_text(index.to_json())
    return out


@pytest.fixture
def memory():
    """Return a file system in the memory of this process."""
    files = pytest.importorskip('fsspec', reason='an extra: mose_ros[train]').filesystem('memory')
    yield files
    files.rm('/', recursive=True)


@pytest.fixture(params=['folder', 'url of a folder', 'bucket', 'packed', 'packed in a bucket'])
def anywhere(request, clips, packed, tmp_path):
    """Return the same clips, wherever they lie."""
    source = packed if 'packed' in request.param else clips
    if 'bucket' in request.param:
        memory = request.getfixturevalue('memory')
        memory.put(str(source), '/bucket/data', recursive=True)
        return storage.place('memory://bucket/data/', Cache(tmp_path / 'cache'))
    return storage.place(f'file://{source}' if 'url' in request.param else source)


def test_clips_are_the_same_wherever_they_lie(anywhere, clips):
    found = list(find_clips(anywhere))
    assert [one.name for one in found] == list(CLIPS)
    for here, there in zip(find_clips(clips), found, strict=True):
        one, other = ClipReader(here), ClipReader(there)
        assert len(one) == len(other) and one.metadata == other.metadata
        last = len(one) - 1
        assert one.annotation(last) == other.annotation(last) != other.annotation(0)
        assert np.array_equal(one.image(last, 'back'), other.image(last, 'back'))
        assert one.images(0).keys() == other.images(0).keys()
        assert one.has_semantics() and other.has_semantics()
        assert np.array_equal(one.semantic(last, 'front'), other.semantic(last, 'front'))
        assert not np.array_equal(other.semantic(last, 'front'), other.semantic(0, 'front'))


def test_samples_for_labelling_are_the_same_wherever_they_lie(anywhere, clips):
    here, there = (bench2drive.ClipSource(root, None) for root in (clips, anywhere))
    assert len(here) == len(there) == 5
    one, other = here.sample(4), there.sample(4)
    assert (one.name, one.facts) == (other.name, other.facts) and one.name == 'normal_00000:00001'
    assert one.pictures()['front'].data == other.pictures()['front'].data


def test_a_place_is_used_like_a_path(anywhere):
    assert storage.names(anywhere) == [*CLIPS, 'notes.txt']
    assert (anywhere / 'notes.txt').is_file() and not (anywhere / 'notes.txt').is_dir()
    assert (anywhere / CLIPS[0] / 'anno').is_dir() and not (anywhere / CLIPS[0]).is_file()
    assert not (anywhere / 'nothing').is_dir() and not (anywhere / 'nothing/x').is_file()
    assert storage.names(anywhere / CLIPS[0]) == ['anno', 'camera']
    assert storage.names(anywhere / 'nothing') == []
    assert (anywhere / 'notes.txt').read_text(encoding='utf-8') == 'not a clip'
    assert storage.local_file(anywhere / 'notes.txt').read_bytes() == b'not a clip'
    assert str(anywhere / 'a' / 'b') == f'{anywhere}/a/b' and (anywhere / 'a').parent == anywhere
    with pytest.raises(FileNotFoundError, match='00009'):
        (anywhere / CLIPS[0] / 'anno' / '00009.json.gz').read_bytes()
    with pytest.raises(ValueError, match='rgb_front/00002.jpg cannot be read: No such file'):
        clip = ClipReader(anywhere / CLIPS[0])
        clip.folder = anywhere / 'nothing'
        clip.image(2, 'front')


@pytest.mark.parametrize(
    ('wrong', 'told'),
    [
        ({'name': '../notes.txt'}, "'../notes.txt' is no plain file name"),
        ({'name': '..'}, 'no plain file name'),
        ({'name': '/etc/passwd'}, 'no plain file name'),
        ({'sha256': '../../../etc/passwd'}, 'no sha256'),
        ({'sha256': 'A' * 64}, 'no sha256'),
        ({'size': -1}, 'a size of -1'),
        ({'size': '12'}, "a size of '12'"),
    ],
)
def test_an_index_names_no_file_outside_of_its_folder(packed, wrong, told):
    path = packed / shards.INDEX
    data = json.loads(path.read_text())
    assert storage.local_file(storage.place(packed) / 'notes.txt').is_file()
    data['files'][0] |= wrong
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f'shards.json is no index of shards .*{told}'):
        storage.place(packed)


@pytest.mark.parametrize('ranges', [False, True])
def test_a_web_server_is_enough(clips, packed, tmp_path, ranges):
    pytest.importorskip('aiohttp', reason='an extra: mose_ros[train]')
    with FileServer(packed, ranges=ranges) as server:
        root = storage.place(server.url, Cache(tmp_path / 'cache', pause=0.0))
        for clip in find_clips(root):
            there, here = ClipReader(clip), ClipReader(clips / clip.name)
            assert np.array_equal(there.image(1, 'front'), here.image(1, 'front'))
        assert server.requests.count('/0.tar') == server.requests.count('/1.tar') == 1
        again = storage.place(server.url, Cache(tmp_path / 'cache'))
        ClipReader(again / CLIPS[0]).image(0, 'front')
        assert server.requests.count('/0.tar') == 1, 'the cache holds it'
    with FileServer(clips) as server:  # a list of links in HTML is a folder
        there = storage.place(server.url, Cache(tmp_path / 'cache'))
        assert [one.name for one in find_clips(there)] == list(CLIPS)


def test_a_shard_that_breaks_off_is_fetched_again_and_one_that_is_damaged_is_named(
    packed, tmp_path, caplog
):
    pytest.importorskip('aiohttp', reason='an extra: mose_ros[train]')
    with FileServer(packed) as server:
        server.cuts['/0.tar'] = 2
        root = storage.place(server.url, Cache(tmp_path / 'cache', pause=0.0))
        assert ClipReader(root / CLIPS[0]).image(0, 'front').any()
        assert server.requests.count('/0.tar') == 3
        data = bytearray((packed / '1.tar').read_bytes())
        data[5000] ^= 1
        (packed / '1.tar').write_bytes(data)
        name = f'{CLIPS[1]}/camera/rgb_front/00000.jpg'
        for _ in range(2):
            with pytest.raises(shards.BrokenShard, match='1.tar: .*sha256'):
                (root / name).read_bytes()
        assert server.requests.count('/1.tar') == 3, 'it is not asked for anew by each sample'
    assert '1.tar cannot be used' in caplog.text and 'its 1 clips' in caplog.text
    assert ClipReader(root / CLIPS[0]).image(1, 'front').any(), 'the other is whole'


def test_a_shard_cut_short_on_the_disk_is_named(packed):
    (packed / '0.tar').write_bytes((packed / '0.tar').read_bytes()[:-5000])
    root = storage.place(packed)
    assert len(ClipReader(root / CLIPS[1])) == 2
    with pytest.raises(ValueError, match='00000.json.gz cannot be read: .*0.tar.* bytes instead'):
        ClipReader(root / CLIPS[0]).annotation(0)


def test_shards_fetched_ahead_are_there(packed, memory, tmp_path):
    memory.put(str(packed), '/data', recursive=True)
    cache = Cache(tmp_path / 'cache')
    root = storage.place('memory://data', cache)
    storage.fetch_ahead(root, [1, 0])
    tars = [(packed / f'{n}.tar').read_bytes() for n in (0, 1)]
    for _ in range(200):
        if all(cache.holds(hashlib.sha256(one).hexdigest(), len(one)) for one in tars):
            break
        root.tree._fetcher.join(0.05)
    else:
        pytest.fail('they never came')


def test_what_cannot_be_reached_says_what_to_do(tmp_path, packed, memory):
    cases = {
        's3://bucket/data': 's3fs',
        'nonsense://bucket': 'nonsense',
        'memory://nowhere': 'empty, or there is no such folder',
    }
    for url, text in cases.items():
        with pytest.raises(ValueError, match=text):
            storage.place(url)
    memory.put(str(packed), '/data', recursive=True)
    with pytest.raises(ValueError, match='raise --cache-gb'):
        storage.place('memory://data', Cache(tmp_path / 'cache', limit=1000))
    (packed / shards.INDEX).write_text('{"format": 9}')
    with pytest.raises(ValueError, match='shards.json is no index .*format 9 instead of 1'):
        storage.place(packed)
    pytest.importorskip('aiohttp', reason='an extra: mose_ros[train]')
    (tmp_path / 'empty').mkdir()
    with (
        FileServer(tmp_path / 'empty', lists=False) as server,
        pytest.raises(ValueError, match='holds no shards.json and cannot be listed.* pack'),
    ):
        storage.place(server.url)


def test_what_writes_wants_a_local_folder(packed, clips):
    assert storage.writable(str(clips), 'collect') == clips
    assert storage.writable(f'file://{clips}', 'collect') == clips
    with pytest.raises(
        ValueError, match='collect writes to a local folder, not to s3://b/d.*pack'
    ):
        storage.writable('s3://b/d', 'collect')
    with pytest.raises(ValueError, match='is packed, and shards are never changed'):
        storage.writable(packed, 'annotate')
    assert storage.location('s3://b/d') == 's3://b/d' and storage.location('a/b').parts == (
        'a',
        'b',
    )

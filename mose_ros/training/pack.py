"""Pack an annotated data set into tar shards of whole clips, for a bucket or a web server: `python -m mose_ros.training pack`.

Clips lie in the order of the split, so those for validation share the first shards and a smaller share of the data needs fewer of
them; else the order is as good as random, and so is what a shard holds. What is packed is what is read: annotation,
pictures of colours and classes, labels. The same clips give the same bytes. A stopped packing goes on after the last whole shard.
"""

import hashlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mose_ros.core.bundle import sha256
from mose_ros.core.files import file_beside
from mose_ros.data import shards, storage
from mose_ros.data.clips import find_clips
from mose_ros.data.remote import Remote
from mose_ros.data.shards import INDEX, Index, Shard, Whole
from mose_ros.training import annotate
from mose_ros.training.config import digest
from mose_ros.training.index import place_in_split

_LOG = logging.getLogger(__name__)
SHARD_MB = 256.0
FILES = (annotate.DATASET, annotate.TOKENIZER)  # that belong to no clip
STREAMS = ('rgb_', 'semantic_')  # of a clip's cameras
_HEADER = 512  # bytes of a file in a tar, beside its content


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A clip to pack: its files by name from the root of the data set, with their sizes."""

    name: str
    files: dict[str, int]

    @property
    def bytes(self) -> int:
        """Return what it takes in a tar."""
        return sum(_HEADER + shards.padded(size) for size in self.files.values())


def pack(
    root: str | Path,
    out: str | Path,
    *,
    shard_mb: float = SHARD_MB,
    seed: int = 0,
    bar: bool = True,
) -> Index:
    """Write the shards of a local data set to a folder or a URL, and return their index; at once when they are there.

    shard_mb: a shard is closed before it gets larger, in 10^6 bytes. seed: `data.seed` of the trainings that will read it.
    ValueError where the data set is not annotated, or another one lies at `out`.
    """
    folder = storage.writable(root, 'pack')
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ValueError(
            f'{folder} holds no {missing[0]}; run `python -m mose_ros.training annotate` first'
        )
    if not storage.is_url(out) and storage.local_folder(out).resolve() == folder.resolve():
        raise ValueError(f'{out} is the data itself; give another folder with --out')
    target = _Bucket(out) if storage.is_url(out) else _Folder(storage.local_folder(out))
    groups = _group(_clips(folder, bar), int(shard_mb * 1e6), seed)
    done = Index.from_json(target.read(INDEX), target.where) if target.size(INDEX) else None
    packed = []
    with tqdm(total=len(groups), desc='pack', unit='shard', disable=not bar) as progress:
        for number, clips in enumerate(groups):
            packed.append(_pack_shard(folder, target, f'shard-{number:05d}', clips, done))
            progress.update()
    index = Index(shards=tuple(packed), files=tuple(Whole.of(folder / name) for name in FILES))
    if done:
        _check(index == done, target)
        return index
    for name in FILES:
        with target.new(name) as path:
            path.write_bytes((folder / name).read_bytes())
    with target.new(INDEX) as path:  # last: from now on they are read
        path.write_text(index.to_json(), encoding='utf-8')
    return index


def _clips(root: Path, bar: bool) -> list[Clip]:
    """Return the annotated clips; others are told and left out."""
    names = annotate.labelled(root)
    known = {clip.relative_to(root).as_posix() for clip in find_clips(root)}
    if left_out := sorted(known.difference(names)):
        text = ', '.join(left_out[:8]) + (' ...' if len(left_out) > 8 else '')
        _LOG.warning('left out %d clips without labels: %s', len(left_out), text)
    if not names:
        raise ValueError(
            f'{root} holds no annotated clip; run `python -m mose_ros.training annotate` first'
        )
    shown = tqdm(names, desc='look', unit='clip', disable=not bar)
    return [Clip(name=name, files=dict(_files(root, name))) for name in shown]


def _files(root: Path, name: str) -> Iterator[tuple[str, int]]:
    """Yield the files of a clip that are read, by their names from the root, with their sizes."""
    clip = root / name
    folders = [
        f'camera/{one}' for one in storage.names(clip / 'camera') if one.startswith(STREAMS)
    ]
    yield f'{name}/{annotate.LABELS}', (clip / annotate.LABELS).stat().st_size
    for folder in ('anno', *folders):
        for file in storage.names(clip / folder):
            if not file.endswith('.partial'):
                yield f'{name}/{folder}/{file}', (clip / folder / file).stat().st_size


def _group(clips: Sequence[Clip], limit: int, seed: int) -> list[list[Clip]]:
    """Return the clips of each shard; one that is larger than the limit has a shard of its own."""
    groups, room = [], 0
    for clip in sorted(clips, key=lambda one: (place_in_split(one.name, seed), one.name)):
        if not groups or clip.bytes > room:
            groups.append([])
            room = limit
        groups[-1].append(clip)
        room -= clip.bytes
    return groups


def _pack_shard(
    root: Path, target: '_Folder | _Bucket', name: str, clips: Sequence[Clip], done: Index | None
) -> Shard:
    """Write a shard unless it is there; its table is written after it."""
    sizes = {file: size for clip in clips for file, size in clip.files.items()}
    made_of = digest([sizes, [sha256(root / one.name / annotate.LABELS) for one in clips]])
    tar, table = f'{name}.tar', f'{name}.json.gz'
    data = target.read(table) if target.size(table) else b''
    try:
        known = shards.read_table(data, f'{target.where}/{table}')
    except ValueError:  # there is none, or only the beginning of one
        known = {'made_of': ''}
    if known['made_of'] != made_of or target.size(tar) != known['tar']['size']:
        _check(done is None, target)
        with target.new(tar) as path:
            data = shards.write_shard(path, root, sizes, at_once=annotate.LABELS, made_of=made_of)
        with target.new(table) as path:
            path.write_bytes(data)
        known = shards.read_table(data, table)
    return Shard(
        tar=Whole(name=tar, **known['tar']),
        table=Whole(name=table, size=len(data), sha256=hashlib.sha256(data).hexdigest()),
        clips=tuple(sorted(one.name for one in clips)),
    )


def _check(same: bool, target: '_Folder | _Bucket') -> None:
    if not same:
        raise ValueError(
            f'{target.where} holds other shards, or not all of its own any more; pack into another folder, or remove '
            f'{INDEX} there first'
        )


class _Folder:
    """A local folder that shards are written to, beside and renamed."""

    def __init__(self, folder: Path):
        self.where = str(folder)
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def size(self, name: str) -> int | None:
        path = self._folder / name
        return path.stat().st_size if path.is_file() else None

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def new(self, name: str) -> AbstractContextManager[Path]:
        """Lend a path to write to."""
        return file_beside(self._folder / name)


class _Bucket(Remote):
    """A folder elsewhere that shards are written to, each when it is whole."""

    @contextmanager
    def new(self, name: str) -> Iterator[Path]:
        """Lend a path to write to."""
        with tempfile.TemporaryDirectory(prefix='mose-pack-') as folder:
            yield Path(folder) / name
            self.upload(Path(folder) / name, name)

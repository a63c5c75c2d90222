"""Tar shards of whole clips: few large files in place of many small ones, for a bucket or a web server.

    shards.json             what there is: shards with size, hash and clips; the data set's own files
    dataset.json ...        files of the data set that belong to no clip
    shard-00000.tar         whole clips as they lay in their folder; the same bytes from the same clips
    shard-00000.json.gz     where each file lies in the shard, and the labels, so that a training knows all of them at once

shards.json is written last. A reader gets whole files from `storage`, local or fetched, and reads the bytes of one picture out of
a shard by its offset.
"""

import contextlib
import errno
import gzip
import io
import json
import logging
import queue
import re
import tarfile
import threading
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int64

from mose_ros.core.bundle import sha256

_LOG = logging.getLogger(__name__)
INDEX = 'shards.json'
FORMAT = 1
_FILE_NAME = re.compile(r'(?!\.{1,2}$)[^/\\\0]+')
_SHA256 = re.compile('[0-9a-f]{64}')
_BLOCK = 512  # of tar
_ANY_BYTES = 'surrogateescape'  # labels that are broken stay as they are


class BrokenShard(OSError):
    """A shard that can't be had whole; nothing in it can be read."""

    def __init__(self, name: str, reason: str):
        super().__init__(errno.EIO, f'{name}: {reason}')
        self.name, self.reason = name, reason


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A file that is read or fetched as a whole; ValueError where that is no plain file, for both names become paths here."""

    name: str
    size: int
    sha256: str

    def __post_init__(self):
        if not isinstance(self.name, str) or not _FILE_NAME.fullmatch(self.name):
            raise ValueError(f'{self.name!r} is no plain file name')
        if type(self.size) is not int or self.size < 0:
            raise ValueError(f'{self.name}: a size of {self.size!r}')
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise ValueError(f'{self.name}: {self.sha256!r} is no sha256')

    @classmethod
    def of(cls, path: Path) -> 'Whole':
        """Describe a local file under its own name."""
        return cls(name=path.name, size=path.stat().st_size, sha256=sha256(path))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What the index says of a shard."""

    tar: Whole
    table: Whole
    clips: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Index:
    """What shards.json says."""

    shards: tuple[Shard, ...]
    files: tuple[Whole, ...]  # that belong to no clip

    def to_json(self) -> str:
        """Return the text of shards.json."""
        return json.dumps({'format': FORMAT, **asdict(self)}, indent=1) + '\n'

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> 'Index':
        """Read the text of shards.json; ValueError names where it lies when it is none or of another version."""
        try:
            data = json.loads(text)
            if data['format'] != FORMAT:
                raise ValueError(f'format {data["format"]} instead of {FORMAT}')
            shards = tuple(
                Shard(
                    tar=Whole(**one['tar']),
                    table=Whole(**one['table']),
                    clips=tuple(one['clips']),
                )
                for one in data['shards']
            )
            return cls(shards=shards, files=tuple(Whole(**one) for one in data['files']))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{where} is no index of shards ({type(error).__name__}: {error}); pack the data again'
            ) from None


class Files(Protocol):
    """Where shards lie."""

    where: str

    def path(self, whole: Whole) -> Path:
        """Return a local file with the contents; OSError."""

    @property
    def fetches(self) -> bool:
        """Return whether files come from elsewhere."""

    def holds(self, whole: Whole) -> bool:
        """Return whether a file is local already."""


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """The files of one folder in a shard."""

    names: tuple[str, ...]  # sorted
    offsets: Int64[np.ndarray, 'n']
    sizes: Int64[np.ndarray, 'n']


class Shards:
    """All files of a packed data set, as if they lay in folders; a `storage.Tree`."""

    def __init__(self, index: Index, files: Files):
        self.where = files.where
        self._index, self._files = index, files
        self._wholes = {one.name: one for one in index.files}
        self._shard = {clip: n for n, shard in enumerate(index.shards) for clip in shard.clips}
        self._folders: dict[int, dict[str, _Folder]] = {}  # of each shard, once needed
        self._texts: dict[int, dict[str, bytes]] = {}
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}  # most folders hold the same
        self._broken: dict[int, BrokenShard] = {}
        self._locks = [threading.Lock() for _ in index.shards]
        self._lock = threading.Lock()
        self._ahead: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._fetching: set[int] = set()
        self._fetcher: threading.Thread | None = None

    @property
    def is_fetched(self) -> bool:
        """Return whether shards come from elsewhere."""
        return self._files.fetches

    @property
    def sizes(self) -> list[int]:
        """Return the bytes of each shard."""
        return [shard.tar.size for shard in self._index.shards]

    def shard_of(self, clip: str) -> int:
        """Return which shard holds a clip."""
        return self._shard[clip]

    def find(self, tail: str) -> list[str]:
        """Return the clips that hold a file called `tail`."""
        return [clip for clip in sorted(self._shard) if self.is_file(f'{clip}/{tail}')]

    def names(self, folder: str) -> list[str]:
        """Return the names of what lies directly in a folder, sorted; none where it does not exist."""
        inside = f'{folder}/' if folder else ''
        shard = self._holder(folder)
        if shard is None:  # above the clips
            above = [*self._shard, *self._wholes]
            return sorted(
                {n[len(inside) :].partition('/')[0] for n in above if n.startswith(inside)}
            )
        folders = self._read_table(shard)[0]
        below = {n[len(inside) :].partition('/')[0] for n in folders if n.startswith(inside)}
        return sorted(below.union(folders[folder].names if folder in folders else ()))

    def is_file(self, name: str) -> bool:
        """Return whether there is such a file."""
        return name in self._wholes or self._find(name) is not None

    def read(self, name: str) -> bytes:
        """Return a file's contents; FileNotFoundError, BrokenShard, or OSError where a table can't be had."""
        if name in self._wholes:
            return self._files.path(self._wholes[name]).read_bytes()
        place = self._find(name)
        if place is None:
            raise FileNotFoundError(
                errno.ENOENT, 'No such file or directory', f'{self.where}/{name}'
            )
        shard, offset, size = place
        if name in self._texts[shard]:
            return self._texts[shard][name]
        tar = self._index.shards[shard].tar
        for _ in range(3):
            path = self.fetch(shard)
            try:
                with path.open('rb') as file:
                    file.seek(offset)
                    data = file.read(size)
            except FileNotFoundError:
                continue  # it has just left the cache
            if len(data) < size:
                raise BrokenShard(tar.name, f'it ends before {name}')
            return data
        raise BrokenShard(tar.name, 'it leaves the cache as soon as it is there; raise --cache-gb')

    def local_file(self, name: str) -> Path:
        """Return a file that belongs to no clip as a local one."""
        if name not in self._wholes:
            raise FileNotFoundError(errno.ENOENT, 'not in the index', f'{self.where}/{name}')
        return self._files.path(self._wholes[name])

    def fetch(self, shard: int) -> Path:
        """Return a shard as a local file; BrokenShard, at once if it could not be had before."""
        tar = self._index.shards[shard].tar
        with self._locks[shard]:  # whoever waits for one that fails does not try again
            if shard in self._broken:
                raise self._broken[shard]
            try:
                return self._files.path(tar)
            except OSError as error:
                missing = isinstance(error, FileNotFoundError)
                reason = 'it is missing' if missing else error.strerror or str(error)
                self._broken[shard] = BrokenShard(tar.name, reason)
                _LOG.error(
                    '%s/%s cannot be used: %s; its %d clips are left out until the next start',
                    self.where,
                    tar.name,
                    reason,
                    len(self._index.shards[shard].clips),
                )
                raise self._broken[shard] from None

    def fetch_ahead(self, shards: Iterable[int]) -> None:
        """Fetch shards in the background, in this order, as far as they are not here."""
        for shard in shards:
            here = shard in self._broken or self._files.holds(self._index.shards[shard].tar)
            with self._lock:
                if here or shard in self._fetching:
                    continue
                self._fetching.add(shard)
                self._ahead.put(shard)
                if self._fetcher is None:
                    # a daemon: whoever stops does not wait for the rest of a shard
                    self._fetcher = threading.Thread(target=self._fetch_all, daemon=True)
                    self._fetcher.start()

    def _fetch_all(self) -> None:
        while True:
            shard = self._ahead.get()
            with contextlib.suppress(BrokenShard):  # whoever reads from it will be told
                self.fetch(shard)
            with self._lock:
                self._fetching.discard(shard)

    def _holder(self, name: str) -> int | None:
        """Return the shard of the clip that a file or folder lies in, or is; None where it lies in none."""
        parts = name.split('/')
        clips = ('/'.join(parts[:count]) for count in range(1, len(parts) + 1))
        return next((self._shard[clip] for clip in clips if clip in self._shard), None)

    def _find(self, name: str) -> tuple[int, int, int] | None:
        """Return a file's shard, offset and size; None where there is none."""
        shard = self._holder(name)
        if shard is None:
            return None
        folder, _, last = name.rpartition('/')
        found = self._read_table(shard)[0].get(folder)
        if found is None:
            return None
        place = bisect_left(found.names, last)
        if place == len(found.names) or found.names[place] != last:
            return None
        return shard, int(found.offsets[place]), int(found.sizes[place])

    def _read_table(self, shard: int) -> tuple[dict[str, _Folder], dict[str, bytes]]:
        if shard not in self._folders:
            whole = self._index.shards[shard].table
            data = read_table(self._files.path(whole).read_bytes(), f'{self.where}/{whole.name}')
            with self._lock:
                self._texts[shard] = {
                    n: text.encode(errors=_ANY_BYTES) for n, text in data['texts'].items()
                }
                self._folders[shard] = {
                    folder: self._folder(one) for folder, one in data['folders'].items()
                }
        return self._folders[shard], self._texts[shard]

    def _folder(self, data: Mapping[str, Sequence]) -> _Folder:
        names = tuple(data['names'])
        return _Folder(
            names=self._names.setdefault(names, names),
            offsets=np.asarray(data['offsets'], np.int64),
            sizes=np.asarray(data['sizes'], np.int64),
        )


def read_table(data: bytes, where: str) -> dict[str, Any]:
    """Read where the files of a shard lie; ValueError names the table when it is none."""
    try:
        table = json.loads(gzip.decompress(data))
        if not {'made_of', 'tar', 'folders', 'texts'} <= table.keys():
            raise ValueError('it lacks fields')
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError, AttributeError) as error:
        raise ValueError(f'{where} is no table of a shard: {error}; pack the data again') from None
    return table


def write_shard(
    path: Path, root: Path, names: Sequence[str], *, at_once: str, made_of: str
) -> bytes:
    """Write files under a root as a tar, in order of their names, and return the bytes of its table.

    at_once: files of that name lie in the table too. made_of: a hash that says whether the same would be written again.
    """
    folders: dict[str, dict[str, list]] = {}
    texts = {}
    with tarfile.open(path, 'w', format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(names):
            data = (root / name).read_bytes()
            info = tarfile.TarInfo(name)  # time, owner and group are 0: only contents count
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            folder, _, last = name.rpartition('/')
            one = folders.setdefault(folder, {'names': [], 'offsets': [], 'sizes': []})
            one['names'].append(last)
            one['offsets'].append(tar.offset - padded(len(data)))
            one['sizes'].append(len(data))
            if last == at_once:
                texts[name] = data.decode(errors=_ANY_BYTES)
    table = {
        'made_of': made_of,
        'tar': {'size': path.stat().st_size, 'sha256': sha256(path)},
        'folders': folders,
        'texts': texts,
    }
    return gzip.compress(json.dumps(table, separators=(',', ':')).encode(), mtime=0)


def padded(size: int) -> int:
    """Return the bytes that a file of that size takes in a tar, without its header."""
    return -(-size // _BLOCK) * _BLOCK

"""Where recorded data lies: in a local folder, in one that fsspec reaches (s3://bucket/data), or packed into shards in either.

`place` opens any of them. What it returns is a `pathlib.Path` where the files are local, and else a `Place`: the part of Path
that readers use, so they are written once. Everything that reads recorded data goes through here; what writes it is for
local folders, and `shards` are made of those.
"""

import errno
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

from mose_ros.data.cache import Cache, WrongFile
from mose_ros.data.remote import Remote
from mose_ros.data.shards import INDEX, Index, Shards, Whole

_LOG = logging.getLogger(__name__)
_LOCAL = ('file://', 'local://')


class Tree(Protocol):
    """Files under one root, by names such as `clip/anno/00000.json.gz`; '' is the root itself."""

    where: str

    def names(self, folder: str) -> list[str]:
        """Return the names of what lies directly in a folder, sorted; none where it does not exist."""

    def is_file(self, name: str) -> bool:
        """Return whether there is such a file."""

    def read(self, name: str) -> bytes:
        """Return a file's contents; OSError."""

    def local_file(self, name: str) -> Path:
        """Return a file as a local one; OSError."""

    def find(self, tail: str) -> list[str]:
        """Return the folders, at any depth, that hold a file called `tail`."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A file or a folder that is no local one; as far as it goes, it is used like a Path."""

    tree: Tree = field(repr=False)
    path: str = ''

    @property
    def name(self) -> str:
        """Return the last part of the path."""
        return PurePosixPath(str(self)).name

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names from the root of the data set on; they sort as those of a Path do."""
        return PurePosixPath(self.path).parts

    @property
    def parent(self) -> 'Place':
        """Return the folder that this lies in."""
        return Place(tree=self.tree, path=self.path.rpartition('/')[0])

    def __truediv__(self, name: str) -> 'Place':
        return Place(tree=self.tree, path=f'{self.path}/{name}' if self.path else str(name))

    def __str__(self) -> str:
        return f'{self.tree.where}/{self.path}' if self.path else self.tree.where

    def relative_to(self, root: 'Place') -> PurePosixPath:
        """Return the path from a folder above."""
        return PurePosixPath(self.path).relative_to(root.path)

    def is_file(self) -> bool:
        """Return whether it is a file."""
        return self.tree.is_file(self.path)

    def is_dir(self) -> bool:
        """Return whether it is a folder with something in it."""
        return bool(self.tree.names(self.path))

    def read_bytes(self) -> bytes:
        """Return a file's contents; OSError."""
        return self.tree.read(self.path)

    def read_text(self, encoding: str = 'utf-8') -> str:
        """Return a text file's contents; OSError."""
        return self.read_bytes().decode(encoding)


Anywhere = Path | Place


def location(text: str) -> Path | str:
    """Return what an argument of the command line names: a local path, or a URL, which a Path would spoil."""
    return text if is_url(text) else local_folder(text)


def local_folder(root: str | Path) -> Path:
    """Return the path of what is no URL, or one of this machine (file:///data)."""
    text = str(root)
    return Path(text.partition('://')[2] if text.startswith(_LOCAL) else root)


def is_url(root: object) -> bool:
    """Return whether this names something beyond the local disk."""
    return isinstance(root, str) and '://' in root and not root.startswith(_LOCAL)


def place(root: str | Path | Place, cache: Cache | None = None) -> Anywhere:
    """Open a data set: a folder, a URL of fsspec, or a Place as it is; ValueError names what is missing to reach it.

    cache: where fetched shards are kept, in the user's own folder by default.
    """
    if isinstance(root, Place):
        return root
    if not is_url(root):
        folder = local_folder(root)
        if not (folder / INDEX).is_file():
            return folder
        text = (folder / INDEX).read_bytes()
        index = Index.from_json(text, str(folder / INDEX))
        return Place(tree=Shards(index, _Here(folder)))
    remote = Remote(root)
    cache = cache or Cache()
    try:
        text = remote.read(INDEX)
    except FileNotFoundError:
        return Place(tree=_Unpacked(remote, cache))
    index = Index.from_json(text, f'{remote.where}/{INDEX}')
    large = max((one.tar.size for one in index.shards), default=0)
    if large > cache.limit:
        raise ValueError(
            f'{remote.where} has a shard of {large / 1e9:.2f} GB, the cache holds {cache.limit / 1e9:.2f} GB; '
            'raise --cache-gb'
        )
    return Place(tree=Shards(index, _There(remote, cache)))


def writable(root: str | Path | Place, verb: str) -> Path:
    """Return the local folder that a verb writes to; ValueError says how data gets elsewhere."""
    if isinstance(root, Place) or is_url(root):
        raise ValueError(
            f'{verb} writes to a local folder, not to {root}; give one with --data, then bring it there with '
            f'`python -m mose_ros.training pack --data DIR --out {root}`'
        )
    found = place(root)
    if isinstance(found, Place):
        raise ValueError(
            f'{root} is packed, and shards are never changed; {verb} in the folder that they were packed from'
        )
    return found


def names(folder: Anywhere) -> list[str]:
    """Return the names of what lies directly in a folder, sorted; none where it does not exist."""
    if isinstance(folder, Place):
        return folder.tree.names(folder.path)
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def find(root: Anywhere, tail: str) -> Iterator[Anywhere]:
    """Yield the folders, at any depth, that hold a file called `tail` (`anno/00000.json.gz`)."""
    if not isinstance(root, Place):
        if (root / tail).is_file():
            yield root
        yield from _find_below(root, tail)
    else:
        for folder in root.tree.find(tail):
            if f'{folder}/'.startswith(f'{root.path}/' if root.path else ''):
                yield Place(tree=root.tree, path=folder)


def _find_below(folder: Path, tail: str) -> Iterator[Path]:
    """Yield the folders that hold `tail`; into those it does not go, for a clip's pictures are many."""
    try:
        with os.scandir(folder) as entries:
            below = [folder / entry.name for entry in entries if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # lost+found of a disk is no one's to read
    for path in below:
        if (path / tail).is_file():
            yield path
        else:
            yield from _find_below(path, tail)


def shards_of(root: Anywhere, clips: Iterable[str]) -> tuple[int, ...]:
    """Return which shard holds each clip; nothing where clips are not packed."""
    packed = isinstance(root, Place) and isinstance(root.tree, Shards)
    return tuple(map(root.tree.shard_of, clips)) if packed else ()


def check_room(root: Anywhere, cache: Cache, at_once: int) -> None:
    """Warn where the shards that are read at a time (0: all) don't fit into the cache, so that they are fetched over and over."""
    if not isinstance(root, Place) or not isinstance(root.tree, Shards):
        return
    sizes = sorted(root.tree.sizes, reverse=True)
    # while some are read, those that come next arrive
    needed = sum(sizes[: at_once + max(1, at_once // 2)] if at_once else sizes)
    if root.tree.is_fetched and needed > cache.limit:
        _LOG.warning(
            'the cache holds %.2f GB, the shards that %s reads at a time take up to %.2f GB, so they are fetched again and '
            'again; set data.shards_at_once (now %d) lower, or raise --cache-gb',
            cache.limit / 1e9,
            root,
            needed / 1e9,
            at_once,
        )


def fetch_ahead(root: Place, shards: Iterable[int]) -> None:
    """Begin to fetch shards of a packed data set, in this order."""
    root.tree.fetch_ahead(shards)


def local_file(path: Anywhere) -> Path:
    """Return a file as a local one: itself, or its copy in the cache; OSError."""
    return path.tree.local_file(path.path) if isinstance(path, Place) else path


@dataclass(frozen=True)
class _Here:
    """Shards in a local folder."""

    folder: Path
    fetches = False

    @property
    def where(self) -> str:
        return str(self.folder)

    def path(self, whole: Whole) -> Path:
        path = self.folder / whole.name
        if (size := path.stat().st_size) != whole.size:
            raise OSError(errno.EIO, f'{path} has {size} bytes instead of {whole.size}')
        return path

    def holds(self, whole: Whole) -> bool:
        return True


@dataclass(frozen=True)
class _There:
    """Shards that are fetched when they are needed."""

    remote: Remote
    cache: Cache
    fetches = True

    @property
    def where(self) -> str:
        return self.remote.where

    def path(self, whole: Whole) -> Path:
        try:
            return self.cache.path(
                whole.sha256, whole.size, lambda to: self.remote.download(whole.name, to)
            )
        except WrongFile as error:
            raise OSError(errno.EIO, f'{self.where}/{whole.name} {error}') from None

    def holds(self, whole: Whole) -> bool:
        return self.cache.holds(whole.sha256, whole.size)


class _Unpacked:
    """A folder of clips elsewhere, file by file; right for a look, slow for a training."""

    def __init__(self, remote: Remote, cache: Cache):
        self.where = remote.where
        self._remote, self._cache = remote, cache
        try:
            self._names = frozenset(remote.names())
        except FileNotFoundError:
            self._names = frozenset()
        except OSError as error:
            raise ValueError(
                f'{self.where} holds no {INDEX} and cannot be listed ({error}); pack the data with '
                '`python -m mose_ros.training pack`'
            ) from None
        if not self._names:
            raise ValueError(f'{self.where} is empty, or there is no such folder')
        _LOG.warning('%s is not packed: every picture is a request; pack it to train', self.where)
        self._folders: dict[str, set[str]] = {}
        for name in self._names:
            while name:
                folder, _, last = name.rpartition('/')
                self._folders.setdefault(folder, set()).add(last)
                name = folder

    def names(self, folder: str) -> list[str]:
        return sorted(self._folders.get(folder, ()))

    def is_file(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> bytes:
        return self._remote.read(name)

    def local_file(self, name: str) -> Path:
        return self._cache.put(self.read(name))

    def find(self, tail: str) -> list[str]:
        found = (name for name in self._names if f'/{name}'.endswith(f'/{tail}'))
        return [name.removesuffix(tail).rstrip('/') for name in found]

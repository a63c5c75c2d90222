"""Where built engines are kept: one slot per graph, whose header says what its engine was built from.

Knows neither TensorRT nor what an engine is: bytes, a recipe (all that decides whether they may be used) and notes.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import mmap
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mose_ros.core.files import write_bytes
from mose_ros.engine.session import BackendError

VARIABLE = 'MOSE_ROS_ENGINES'
FORMAT = 1
PATIENCE = 2 * 3600.0  # s: longer than any build; whoever holds the lock for longer hangs
_log = logging.getLogger(__name__)


def default_folder() -> Path:
    """Return $MOSE_ROS_ENGINES, else mose_ros/engines in the user's cache folder (XDG)."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    cache = os.environ.get('XDG_CACHE_HOME')  # the specification: a relative one is ignored
    root = Path(cache) if cache and Path(cache).is_absolute() else Path.home() / '.cache'
    return root / 'mose_ros' / 'engines'


class Stale(Exception):  # noqa: N818 - not an error: the reason to build
    """A slot that holds no engine for the recipe; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An engine and what was noted when it was built."""

    engine: mmap.mmap  # of the file: gigabytes that need not be in memory twice
    notes: Mapping[str, Any]


class Slot:
    """The place of one engine: NAME.engine, its header NAME.json and NAME.lock, which stays."""

    def __init__(self, folder: Path, name: str):
        """Make the folder; BackendError where that cannot be."""
        self.folder = folder
        self.engine, self.header, self.lock_file = (
            folder / f'{name}.{ending}' for ending in ('engine', 'json', 'lock')
        )
        try:
            self.engine.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None

    def load(self, recipe: Mapping[str, str]) -> Stored:
        """Return the engine that was built from this recipe, unchanged since; otherwise raise Stale."""
        header = self._read_header()
        if header['recipe'] != recipe:
            raise Stale(_differences(header['recipe'], recipe))
        try:
            with open(self.engine, 'rb') as file:
                size = os.fstat(file.fileno()).st_size
                if not size or size != header['bytes']:
                    raise Stale(f'{self.engine.name} has {size} of {header["bytes"]} bytes')
                engine = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise Stale(f'{self.engine.name} cannot be read ({error.strerror})') from None
        if hashlib.sha256(engine).hexdigest() != header['sha256']:
            raise Stale(f'{self.engine.name} is not the engine of its header: sha256 differs')
        return Stored(engine=engine, notes=header['notes'])

    def store(self, recipe: Mapping[str, str], engine: memoryview, notes: Mapping) -> None:
        """Keep an engine; BackendError where there is no room, with nothing half-written left."""
        header = {
            'format': FORMAT,
            'recipe': dict(recipe),
            'notes': dict(notes),
            'bytes': engine.nbytes,
            'sha256': hashlib.sha256(engine).hexdigest(),
        }
        text = json.dumps({**header, 'header': _seal(header)}, indent=1)
        try:
            write_bytes(self.engine, engine, lasting=True)
            write_bytes(
                self.header, f'{text}\n'.encode(), lasting=True
            )  # last: it vouches for the engine
        except OSError as error:
            raise self._unwritable(error, engine.nbytes) from None

    def require_room(self, nbytes: int) -> None:
        """Raise BackendError where an engine of this size cannot be kept: before the build, not after it."""
        if shutil.disk_usage(self.folder).free < nbytes:
            raise self._unwritable(OSError(0, 'too little room on the disk'), nbytes)

    @contextlib.contextmanager
    def locked(self, patience: float = PATIENCE) -> Iterator[None]:
        """Hold the slot against other processes and threads, as `locked` does."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.lock_file, self.engine.name, patience))
            except OSError as error:
                raise self._unwritable(error) from None
            yield

    def _read_header(self):
        try:
            header = json.loads(self.header.read_text(encoding='utf-8'))
        except FileNotFoundError:
            raise Stale('there is none yet') from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise Stale(f'{self.header.name} cannot be read ({error})') from None
        if not isinstance(header, dict) or header.pop('header', None) != _seal(header):
            raise Stale(f'{self.header.name} is damaged')
        if header['format'] != FORMAT:
            raise Stale(f'{self.header.name} has format {header["format"]}, not {FORMAT}')
        return header

    def _unwritable(self, error, nbytes=0):
        space = ''
        if nbytes:
            free = shutil.disk_usage(self.folder).free
            space = f' ({nbytes / 1e6:.1f} MB to keep, {free / 1e6:.1f} MB free)'
        return BackendError(
            f'{self.engine} cannot be kept: {error.strerror or error}{space}; make room, or '
            f'name another folder with --engines or {VARIABLE}'
        )


@contextlib.contextmanager
def locked(path: Path, what: str, patience: float = PATIENCE) -> Iterator[None]:
    """Hold a file against other processes and threads; OSError where it cannot be, BackendError when patience ends.

    The kernel's lock dies with its holder, so one left behind by a crash holds nobody up; the file itself stays.
    """
    with open(path, 'a+', encoding='ascii') as file:
        _wait(file, what, patience)
        with contextlib.suppress(OSError):  # the name of the holder is only a courtesy
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def _wait(file, what, patience):
    start = told = time.monotonic()
    while True:
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.seek(0)
        holder = f'process {file.read() or "unknown"}'
        now = time.monotonic()
        if now - start > patience:
            raise BackendError(
                f'{holder} has held {file.name} for {patience:.0f} s; if it hangs, end it'
            )
        if told == start or now - told > 30:
            _log.info('%s builds %s; waiting for it', holder, what)
            told = now
        time.sleep(min(0.2, patience))


def _seal(header: Mapping) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    names = sorted({*old, *new})
    parts = [
        f'{name} was {old.get(name, "not set")}, is {new.get(name, "not set")}'
        for name in names
        if old.get(name) != new.get(name)
    ]
    return '; '.join(parts)

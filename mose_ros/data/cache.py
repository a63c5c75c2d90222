"""Files fetched from elsewhere, kept in a local folder up to a limit; those unused for longest leave first.

A file is named by its sha256, so runs, processes and data sets share what is there, and nothing in it can be out of date. It
knows nothing of where files come from.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mose_ros.core.bundle import sha256
from mose_ros.core.files import PARTIAL

FOLDER = Path('~/.cache/mose_ros')
LIMIT = 20 * 10**9  # bytes
ATTEMPTS = 3
_LOCK = 'lock'


class WrongFile(OSError):
    """Something came that is not what was asked for; the text goes on after the name of that."""


class Cache:
    """Safe between threads and processes: each file is fetched by one of them, beside, checked, and renamed."""

    def __init__(self, folder: str | Path = FOLDER, limit: int = LIMIT, pause: float = 1.0):
        self.folder = Path(folder).expanduser()
        self.limit = limit
        self._pause = pause  # s before the second attempt; twice that before the third

    def holds(self, sha: str, size: int) -> bool:
        """Return whether a file is here; if so, it counts as used now."""
        path = self.folder / sha
        try:
            if path.stat().st_size != size:
                return False  # damaged since it was fetched
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def path(self, sha: str, size: int, fetch: Callable[[Path], object]) -> Path:
        """Return a local file of that hash, fetched if it is not here; another process may remove it at any time.

        fetch: writes the file to a path. It is tried again when it fails or brings something else; OSError, or
        WrongFile, after the last time, and FileNotFoundError at once.
        """
        final = self.folder / sha
        if self.holds(sha, size):
            return final
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone(self.folder / f'{sha}.{size}{PARTIAL}') as partial:
            if not self.holds(sha, size):  # nobody else was faster
                self._make_room()
                self._fetch(partial, sha, size, fetch)
                os.replace(partial, final)
        return final

    def put(self, data: bytes) -> Path:
        """Return a local file with that contents, as `path` does."""
        sha = hashlib.sha256(data).hexdigest()
        return self.path(sha, len(data), lambda to: to.write_bytes(data))

    def _fetch(self, partial: Path, sha: str, size: int, fetch: Callable[[Path], object]) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                fetch(partial)
                found = partial.stat().st_size
                if found != size:
                    raise WrongFile(f'has {found} bytes instead of {size}')
                if (actual := sha256(partial)) != sha:
                    raise WrongFile(f'has sha256 {actual[:12]} instead of {sha[:12]}')
                return
            except FileNotFoundError:
                raise
            except OSError:
                if attempt == ATTEMPTS:
                    raise
                time.sleep(self._pause * attempt)

    @contextmanager
    def _alone(self, partial: Path) -> Iterator[Path]:
        """Hold a file that is being fetched; the lock is on the file itself, so a killed process leaves none behind."""
        while True:
            with partial.open('ab') as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_at(file.fileno(), partial):
                    continue  # whoever held it has renamed or removed it
                try:
                    yield partial
                finally:
                    if _is_at(file.fileno(), partial):
                        partial.unlink()
                return

    def _make_room(self) -> None:
        """Remove what was not used for longest until all that is here or under way fits."""
        with (self.folder / _LOCK).open('a') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept, total = [], 0
            for path in self.folder.iterdir():
                if path.suffix == PARTIAL:
                    total += 0 if _abandoned(path) else int(path.suffixes[-2][1:])
                elif path.name != _LOCK:
                    try:
                        state = path.stat()
                    except FileNotFoundError:
                        continue
                    kept.append((state.st_mtime_ns, path, state.st_size))
                    total += state.st_size
            for _, path, size in sorted(kept):
                if total <= self.limit:
                    break
                path.unlink(missing_ok=True)
                total -= size


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _abandoned(partial: Path) -> bool:
    """Remove what a killed process began to fetch; return whether that was so."""
    try:
        with partial.open('rb') as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file.fileno(), partial):
                partial.unlink(missing_ok=True)
            return True
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False  # under way

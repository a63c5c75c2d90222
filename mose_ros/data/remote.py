"""A folder that fsspec reaches: a bucket, a web server, the memory of this process. Its files by name, its errors as OSError."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_CONNECT, _READ = 30, 60  # s without an answer, without a byte; all of a shard may take longer


class Remote:
    """A folder that fsspec reaches, such as a bucket; files in it by their names."""

    def __init__(self, url: str):
        self.where = url.rstrip('/')
        self._files, self._root = _reach(self.where)

    def read(self, name: str) -> bytes:
        """Return a file's contents; OSError."""
        with _errors(self._url(name)):
            return self._files.cat_file(self._path(name))

    def names(self) -> list[str]:
        """Return the names of all files at any depth; OSError where they can't be listed."""
        with _errors(self.where):
            self._files.invalidate_cache()
            found = self._files.find(self._root)
        inside = self._root.rstrip('/') + '/'
        return [one[len(inside) :] for one in found if one.startswith(inside)]

    def size(self, name: str) -> int | None:
        """Return how large a file is; None where there is none."""
        try:
            with _errors(self._url(name)):
                return self._files.size(self._path(name))
        except FileNotFoundError:
            return None

    def download(self, name: str, to: Path) -> None:
        """Copy a file to a local one; OSError."""
        with _errors(self._url(name)):
            self._files.get_file(self._path(name), str(to))

    def upload(self, source: Path, name: str) -> None:
        """Copy a local file to a name, whole or not at all as far as the store can; OSError."""
        with _errors(self._url(name)):
            self._files.put_file(str(source), self._path(name))

    def _path(self, name: str) -> str:
        return f'{self._root.rstrip("/")}/{name}'

    def _url(self, name: str) -> str:
        return f'{self.where}/{name}'


def _reach(url: str) -> 'tuple[AbstractFileSystem, str]':
    protocol, options = url.partition('://')[0], {}
    try:
        from fsspec.core import url_to_fs

        if protocol in ('http', 'https'):
            from aiohttp import ClientTimeout

            wait = ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=_READ)
            options['client_kwargs'] = {'timeout': wait}
        return url_to_fs(url, **options)
    except ImportError as error:
        raise ValueError(
            f'{url} needs a package that is not here: {error}; on a bare machine pip install mose_ros[train] first, '
            f'then what {protocol}:// needs (s3: s3fs, gs: gcsfs, abfs: adlfs)'
        ) from None
    except ValueError as error:
        raise ValueError(f'{url}: {error}; give a folder or a URL that fsspec knows') from None


@contextmanager
def _errors(url: str) -> Iterator[None]:
    """Turn whatever a file system of fsspec raises into OSError: each has its own kinds (aiohttp's, botocore's ...)."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, 'No such file or directory', url) from None
    except Exception as error:
        text = f'{type(error).__name__}: {error}' if str(error) else type(error).__name__
        raise OSError(errno.EIO, f'{url}: {text}') from error

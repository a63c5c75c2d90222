"""Folders that are whole or not there: written beside, then put in place at once."""

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextlib.contextmanager
def written_beside(folder: str | Path) -> Iterator[Path]:
    """Lend an empty folder that takes the place of `folder` at the end, or vanishes when something fails.

    Whoever is killed on the way leaves what was there untouched, and beside it NAME.partial, which the next one removes.
    """
    folder = Path(folder)
    partial, former = (folder.with_name(folder.name + end) for end in ('.partial', '.former'))
    if former.exists() and not folder.exists():
        os.rename(former, folder)  # a kill in the middle of `_replace`
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _replace(partial, folder, former)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, folder: Path, former: Path) -> None:
    """Put a folder in the place of another, which may then lie where the first was."""
    if folder.exists() and _exchange(partial, folder):
        return
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        os.rename(folder, former)
    os.rename(partial, folder)
    shutil.rmtree(former, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders, so that at no moment one of them is missing; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), 'renameat2', None)
    return (
        rename is not None
        and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0
    )

"""Files and folders that are whole or not there: written beside their place, then put into it at once."""

import contextlib
import ctypes
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTIAL = '.partial'  # what is being written is called NAME.partial
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextlib.contextmanager
def file_beside(path: str | Path, lasting: bool = False) -> Iterator[Path]:
    """Lend NAME.partial, which takes the place of the file at the end, or vanishes when something fails.

    lasting: it has reached the disk before it gets its name; for what must outlive a vehicle that is switched off.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        if lasting:
            with partial.open('rb') as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes | memoryview, lasting: bool = False) -> None:
    """Write a file; on OSError the old one stays, and nothing else."""
    with file_beside(path, lasting) as partial:
        partial.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8; on OSError the old file stays, and nothing else."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON; ValueError for what JSON has no word for, as NaN, and the old file stays."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + '\n')


@contextlib.contextmanager
def folder_beside(folder: str | Path) -> Iterator[Path]:
    """Lend an empty folder that takes the place of `folder` at the end, or vanishes when something fails.

    Whoever is killed on the way leaves what was there untouched, and beside it NAME.partial, which the next one removes.
    """
    folder = Path(folder)
    partial, former = (folder.with_name(folder.name + end) for end in (PARTIAL, '.former'))
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

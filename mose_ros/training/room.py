"""Is there room? Asked before anything long begins: of the disk, and of the memory."""

import shutil
from pathlib import Path

SPARE = 2**25  # bytes on disk for tokenizer, graphs, headers and the file system
MEMINFO = Path('/proc/meminfo')
CGROUP = Path('/sys/fs/cgroup')


def check_disk(folder: str | Path, needed: int, what: str) -> None:
    """Raise ValueError, with needed and free bytes in words, unless `what` finds room where `folder` is to be."""
    folder = Path(folder)
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free, needed = shutil.disk_usage(there).free, needed + SPARE
    if free < needed:
        raise ValueError(
            f'{there} has {free / 1e9:.1f} GB free, {what} needs {needed / 1e9:.1f} GB; '
            'make room or choose another --out'
        )


def check_memory(needed: int, what: str) -> None:
    """Raise ValueError, with needed and available bytes in words, unless `what` finds room in memory."""
    available = available_memory()
    if available is not None and available < needed:
        raise ValueError(
            f'{available / 1e9:.1f} GB of memory are available, {what} needs {needed / 1e9:.1f} GB; '
            'end other programs or take a larger machine'
        )


def available_memory() -> int | None:
    """Return the bytes that a process can get without swapping, within its container; None where the system does not say."""
    found = []
    if MEMINFO.is_file():
        lines = dict(line.split(':', 1) for line in MEMINFO.read_text().splitlines())
        found.append(1024 * int(lines['MemAvailable'].split()[0]))
    limit, used = CGROUP / 'memory.max', CGROUP / 'memory.current'
    if limit.is_file() and (text := limit.read_text().strip()) != 'max':
        found.append(int(text) - int(used.read_text()))
    return min(found, default=None)

"""What a process is to its machine: the memory it holds, and who gives way where there are fewer cores than threads."""

import contextlib
import os
import threading
from pathlib import Path

_PAGE = os.sysconf('SC_PAGE_SIZE')
TEXT_NICE = 19  # of the thread that decodes text: docs/performance.md, lanes


def lower_priority(nice: int) -> None:
    """Make the calling thread nicer; Linux gives each thread its own value. Does nothing where that is not possible."""
    with contextlib.suppress(OSError, AttributeError):  # politeness, not correctness
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


def resident_bytes(pid: int | str = 'self') -> int:
    """Return what a process has in memory, shared pages too; OSError where it is gone."""
    return int(Path(f'/proc/{pid}/statm').read_text(encoding='ascii').split()[1]) * _PAGE

"""Who gives way where there are fewer cores than threads: the text to the plan, the film to the drive."""

import contextlib
import os
import threading

TEXT_NICE = 19  # of the thread that decodes text: docs/performance.md, lanes


def lower_priority(nice: int) -> None:
    """Make the calling thread nicer; Linux gives each thread its own value. Does nothing where that is not possible."""
    with contextlib.suppress(OSError, AttributeError):  # politeness, not correctness
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)

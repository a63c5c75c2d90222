"""The processes of one drive: started together, ended together, measured together; and a ROS domain for them alone.

Knows nothing of ROS but names of environment variables, so that the runner can start its nodes before it imports rclpy.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mose_ros.core.process import resident_bytes

DOMAINS = range(40, 100)  # DDS ports of these lie below Linux's ephemeral ones
_PR_SET_PDEATHSIG = 1
_HZ = os.sysconf('SC_CLK_TCK')


class DomainLock:
    """A ROS domain that no other drive on this machine uses, as long as this process lives."""

    def __init__(self, wanted: int | None = None, folder: str | None = None):
        """Take the wanted domain, or the first free one; ValueError when it is taken or can't be."""
        self._folder = Path(folder or tempfile.gettempdir())
        if wanted is not None and not 0 <= wanted <= 232:
            raise ValueError(f'ROS domain {wanted} is not in 0..232')
        for number in DOMAINS if wanted is None else [wanted]:
            if self._take(number):
                self.number = number
                return
        if wanted is None:
            raise ValueError(f'all ROS domains {DOMAINS.start}..{DOMAINS.stop - 1} are in use')
        raise ValueError(
            f'ROS domain {wanted} is in use by another drive on this machine; '
            'unset ROS_DOMAIN_ID and leave out --domain to get a free one'
        )

    def _take(self, number: int) -> bool:
        path = self._folder / f'mose_ros_domain_{number}.lock'
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            return False  # somebody else's
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            return False
        self._file = file  # the kernel gives the lock back when this process ends, however it ends
        return True

    def close(self) -> None:
        """Give the domain back."""
        os.close(self._file)


class Processes:
    """Child processes by name, each in a session of its own, none of which outlives this process."""

    def __init__(self, log_folder: str | Path):
        self._folder = Path(log_folder)
        self._children: dict[str, subprocess.Popen] = {}
        self._started: dict[str, tuple[list[str], dict[str, str]]] = {}

    def start(
        self, name: str, module: str, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        """Run `python -m module arguments`; what it prints goes to its log."""
        self.log(name).unlink(missing_ok=True)
        self._started[name] = ([sys.executable, '-m', module, *arguments], dict(environment))
        self.restart(name)

    def restart(self, name: str) -> None:
        """Run again, as it was started, a process that has ended; its log goes on."""
        command, environment = self._started[name]
        with open(self.log(name), 'ab') as log:
            self._children[name] = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only the runner, which ends them in order
                preexec_fn=_die_with_parent,
            )

    def log(self, name: str) -> Path:
        """Return where a process's output lies."""
        return self._folder / f'{name}.log'

    def pid(self, name: str) -> int:
        """Return the number of a process."""
        return self._children[name].pid

    def ended(self) -> dict[str, int]:
        """Return the exit codes of those that have ended."""
        codes = {name: child.poll() for name, child in self._children.items()}
        return {name: code for name, code in codes.items() if code is not None}

    def tail(self, name: str, lines: int = 12) -> str:
        """Return the end of a process's log."""
        with contextlib.suppress(OSError):
            text = self.log(name).read_text(encoding='utf-8', errors='replace')
            return '\n'.join(text.strip().splitlines()[-lines:])
        return ''

    def resident_mb(self) -> dict[str, float]:
        """Return the resident memory of each process and of this one, shared pages counted in each."""
        pids = {name: child.pid for name, child in self._children.items()} | {'drive': os.getpid()}
        sizes = {}
        for name, pid in pids.items():
            with contextlib.suppress(OSError, IndexError):
                sizes[name] = resident_bytes(pid) / 2**20
        return sizes

    def cpu_seconds(self) -> dict[str, float]:
        """Return the processor time that each has used so far."""
        pids = {name: child.pid for name, child in self._children.items()} | {'drive': os.getpid()}
        used = {}
        for name, pid in pids.items():
            with contextlib.suppress(OSError, IndexError):
                fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
                used[name] = (int(fields[11]) + int(fields[12])) / _HZ
        return used

    def pids(self) -> dict[str, int]:
        """Return the process of each that still runs."""
        return {name: one.pid for name, one in self._children.items() if one.poll() is None}

    def end(self, name: str, timeout_s: float = 8.0) -> None:
        """End one of them; a new one may take its name."""
        _end([self._children.pop(name)], timeout_s)

    def close(self, timeout_s: float = 8.0) -> None:
        """End all, politely, then not."""
        _end(list(self._children.values()), timeout_s)


def _end(children: Sequence[subprocess.Popen], timeout_s: float) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
    deadline = time.monotonic() + timeout_s
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
    for child in children:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """Have the kernel kill this process when the runner dies, even by kill -9; runs in the child before its program."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

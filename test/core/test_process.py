"""What a process says of itself to those who watch it."""

import subprocess
import sys

import pytest

from mose_ros.core.process import resident_bytes

HOLD = 'held = bytearray(b"1") * {size}; print("held", flush=True); input()'


def held_by_another(size):
    """Return what another process has in memory while it holds that many bytes."""
    command = [sys.executable, '-c', HOLD.format(size=size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b'held\n'
        found = resident_bytes(other.pid)
        other.communicate(b'\n')
        return found


def test_memory_is_that_of_the_process_that_is_named():
    size = 1 << 26
    grown = held_by_another(size) - held_by_another(0)
    assert 0.9 * size < grown < 1.2 * size
    with pytest.raises(OSError, match='No such'):
        resident_bytes(1 << 22)  # beyond the highest number that Linux gives

"""Processes that end together, and domains that are not shared."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from mose_ros.nodes.processes import DomainLock, Processes


def is_alive(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


def test_two_drives_get_two_domains(tmp_path):
    first, second = DomainLock(folder=str(tmp_path)), DomainLock(folder=str(tmp_path))
    assert first.number != second.number
    with pytest.raises(ValueError, match='in use by another drive'):
        DomainLock(first.number, folder=str(tmp_path))
    first.close()
    again = DomainLock(first.number, folder=str(tmp_path))
    assert again.number == first.number
    with pytest.raises(ValueError, match='not in 0..232'):
        DomainLock(500)


def test_children_end_with_the_runner_and_their_words_are_kept(tmp_path):
    processes = Processes(tmp_path)
    processes.start('calendar', 'calendar', ['2024', '1'], {})
    processes.start('server', 'http.server', ['0', '--bind', '127.0.0.1'], {})
    deadline = time.monotonic() + 10
    is_up = lambda: 'calendar' in processes.ended() and processes.resident_mb()['server'] > 5  # noqa: E731
    while not is_up() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes.ended() == {'calendar': 0} and 'January' in processes.tail('calendar', 20)
    assert processes.resident_mb()['server'] > 5 and processes.cpu_seconds().keys() >= {
        'server',
        'drive',
    }
    processes.close()
    assert 'server' in processes.ended()


def test_children_die_even_when_the_runner_is_killed(tmp_path):
    script = textwrap.dedent(f"""
        import time
        from mose_ros.nodes.processes import Processes
        processes = Processes({str(tmp_path)!r})
        processes.start('server', 'http.server', ['0', '--bind', '127.0.0.1'], {{}})
        print(processes._children['server'].pid, flush=True)
        time.sleep(60)
    """)
    runner = subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, text=True)
    child = int(runner.stdout.readline())
    assert is_alive(child)
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    deadline = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(child)


def test_a_process_that_was_killed_is_started_again_as_it_was(tmp_path):
    processes = Processes(tmp_path)
    processes.start('server', 'http.server', ['0', '--bind', '127.0.0.1'], {})
    first = processes.pid('server')
    os.kill(first, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not processes.ended() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes.ended() == {'server': -signal.SIGKILL}
    processes.restart('server')
    assert processes.pid('server') != first and not processes.ended()
    processes.close()

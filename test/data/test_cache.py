"""Fetched files are whole, are fetched once, and leave when others need the room."""

import hashlib
import os
import subprocess
import sys
import threading
import time

import pytest

from mose_ros.data.cache import ATTEMPTS, Cache

FILES = {name: name.encode() * 100 for name in 'abcd'}


def sha(name):
    return hashlib.sha256(FILES[name]).hexdigest()


class Source:
    """Counts what is fetched; `wrong` is written in the first so many attempts."""

    def __init__(self, wrong=(), slow=0.0):
        self.fetched, self.wrong, self.slow = [], list(wrong), slow

    def get(self, cache, name):
        def fetch(path):
            self.fetched.append(name)
            time.sleep(self.slow)
            data = self.wrong.pop(0) if self.wrong else FILES[name]
            if isinstance(data, Exception):
                raise data
            path.write_bytes(data)

        return cache.path(sha(name), len(FILES[name]), fetch)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / 'cache', limit=300, pause=0.0)


def test_a_file_is_fetched_once(cache):
    source = Source()
    assert source.get(cache, 'a').read_bytes() == FILES['a']
    assert source.get(cache, 'a').read_bytes() == FILES['a']
    assert source.fetched == ['a']


def test_what_was_unused_for_longest_leaves_first(cache):
    source = Source()
    for name in 'abc':
        source.get(cache, name)
    source.get(cache, 'a')  # used again
    source.get(cache, 'd')
    assert [cache.holds(sha(name), 100) for name in 'abcd'] == [True, False, True, True]
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) == 300


@pytest.mark.parametrize('wrong', [b'', FILES['a'][:50], b'z' * 100, OSError('hung up')])
def test_what_comes_broken_is_fetched_again_and_given_up_in_the_end(cache, wrong):
    source = Source(wrong=[wrong] * (ATTEMPTS - 1))
    assert source.get(cache, 'a').read_bytes() == FILES['a']
    assert len(source.fetched) == ATTEMPTS
    with pytest.raises(OSError, match='50 bytes|0 bytes|sha256|hung up'):
        Source(wrong=[wrong] * ATTEMPTS).get(cache, 'b')
    assert [path.name for path in cache.folder.iterdir() if 'lock' not in path.name] == [sha('a')]


def test_what_does_not_exist_is_asked_for_once(cache):
    source = Source(wrong=[FileNotFoundError()] * 2)
    with pytest.raises(FileNotFoundError):
        source.get(cache, 'a')
    assert len(source.fetched) == 1


def test_a_file_that_was_damaged_since_is_fetched_again(cache):
    source = Source()
    path = source.get(cache, 'a')
    path.write_bytes(b'half')
    assert source.get(cache, 'a').read_bytes() == FILES['a']
    assert source.fetched == ['a', 'a']


def test_many_that_want_the_same_file_wait_for_one(cache):
    source, found = Source(slow=0.05), []
    threads = [
        threading.Thread(target=lambda: found.append(source.get(cache, 'a'))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and source.fetched == ['a']


KILLED = """
import sys, os
from mose_ros.data.cache import Cache
def fetch(path):
    path.write_bytes(b'a')
    os._exit(9)
Cache(sys.argv[1]).path(sys.argv[2], 100, fetch)
"""


def test_a_killed_process_leaves_nothing_that_stands_in_the_way(cache):
    command = [sys.executable, '-c', KILLED, str(cache.folder), sha('b')]
    for _ in range(2):  # the second finds what the first left
        assert subprocess.run(command, env=dict(os.environ)).returncode == 9
        assert len(list(cache.folder.glob('*.partial'))) == 1
    source = Source()
    for name in 'acd':  # what is left of b counts for nothing
        source.get(cache, name)
    assert all(cache.holds(sha(name), 100) for name in 'acd')
    assert not list(cache.folder.glob('*.partial'))

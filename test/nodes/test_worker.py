import os
import threading

import pytest

from mose_ros.nodes.worker import Worker

WAIT = 10.0  # s; what is waited for comes in milliseconds


class Desk:
    """A worker that holds on to each item until it is told to go on."""

    def __init__(self, nice=0):
        self.done, self.errors, self.niceness = [], [], None
        self._begun, self._go = threading.Semaphore(0), threading.Semaphore(0)
        self.worker = Worker('desk', self._work, self.errors.append, nice=nice)

    def _work(self, item):
        self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        self._begun.release()
        assert self._go.acquire(timeout=WAIT)
        if item == 'bad':
            raise ValueError(item)
        self.done.append(item)

    def begin(self, item):
        self.worker.offer(item)
        assert self._begun.acquire(timeout=WAIT)

    def finish(self, count=1):
        """Let the item that is worked on be finished, and those that follow it begin and end."""
        self._go.release()
        for _ in range(count - 1):
            assert self._begun.acquire(timeout=WAIT)
            self._go.release()

    def close(self):
        self._go.release()
        self.worker.close(WAIT)


@pytest.fixture
def desk():
    made = Desk()
    yield made
    made.close()


def test_what_waits_is_replaced_never_queued(desk):
    desk.begin('first')
    for item in ('second', 'third', 'newest'):
        desk.worker.offer(item)
    assert desk.worker.busy and desk.worker.dropped == 2
    desk.finish(2)
    desk.close()
    assert desk.done == ['first', 'newest']


def test_what_waits_can_be_forgotten(desk):
    desk.begin('first')
    desk.worker.offer('second')
    desk.worker.clear()
    desk.close()
    assert desk.done == ['first']


def test_an_error_is_told_and_ends_nothing(desk):
    desk.begin('bad')
    desk.worker.offer('good')
    desk.finish(2)
    desk.close()
    assert [str(error) for error in desk.errors] == ['bad']
    assert desk.done == ['good']


def test_a_worker_can_be_nicer_than_all_others():
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    desk = Desk(nice=19)
    desk.begin('text')
    assert desk.niceness == 19
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine  # of this thread alone
    desk.close()


def test_a_worker_is_as_nice_as_who_made_it_unless_told(desk):
    desk.begin('plan')
    assert desk.niceness == os.getpriority(os.PRIO_PROCESS, 0)

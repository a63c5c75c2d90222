import threading

import pytest

from mose_ros.engine.team import Team


@pytest.mark.parametrize('threads', [1, 2, 5])
@pytest.mark.parametrize('items', [[], [3], [3, 1, 2, 5, 4]])
def test_answers_come_in_the_order_of_the_items(threads, items):
    done = []

    def double(item):
        done.append(item)
        return 2 * item

    assert Team(threads, 'test').map(double, items) == [2 * item for item in items]
    assert sorted(done) == sorted(items)  # each once


def test_several_work_at_once_the_caller_among_them():
    meeting = threading.Barrier(3, timeout=10)  # passed only by three at the same time

    def meet(_):
        meeting.wait()
        return threading.current_thread()

    workers = Team(3, 'test').map(meet, range(3))
    assert len(set(workers)) == 3
    assert threading.current_thread() in workers


def test_fewer_may_work_than_there_are():
    def who(_):
        return threading.current_thread()

    assert set(Team(3, 'test').map(who, range(50), threads=1)) == {threading.current_thread()}


def test_what_goes_wrong_is_raised_once_nobody_works_any_more():
    going, over = threading.Event(), threading.Event()

    def work(item):
        if item == 'bad':
            going.wait(10)  # another one has begun
            raise ValueError(item)
        going.set()
        over.wait(0.2)
        over.set()

    team = Team(2, 'test')
    with pytest.raises(ValueError, match='bad'):
        team.map(work, ['bad', 'slow'])
    assert over.is_set()
    with pytest.raises(ValueError, match='bad'):
        team.map(work, ['slow', 'bad'])
    assert team.map(str, [1, 2]) == ['1', '2']  # it works on


def test_its_threads_end_with_it():
    before = threading.active_count()
    team = Team(4, 'test')
    team.map(lambda _: threading.Event().wait(0.01), range(8))
    helpers = [one for one in threading.enumerate() if one.name.startswith('test')]
    assert helpers
    del team
    for one in helpers:
        one.join(10)
    assert threading.active_count() == before

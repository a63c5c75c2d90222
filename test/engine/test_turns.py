import numpy as np
import pytest

from mose_ros.engine import turns
from mose_ros.engine.turns import Turn


class Named:
    def __init__(self, name, order):
        self.name, self.order = name, order

    def plan(self, index):
        self.order.append((index, self.name))
        return Turn(ms=1.0 + index)


def rounds(count):
    """Return the order of three contestants in each of some rounds behind a warm-up of one, and what they took."""
    order = []
    took = turns.take_turns({name: Named(name, order) for name in 'abc'}, count, 1, pause=0)
    assert [index for index, _ in order] == [index for index in range(count + 1) for _ in 'abc']
    names = ''.join(name for _, name in order)
    return [names[first : first + 3] for first in range(0, len(names), 3)], took


def test_all_plan_on_each_observation():
    order, took = rounds(3)
    assert [sorted(one) for one in order] == [[*'abc']] * 4
    assert [one.ms for one in took['b']] == [2.0, 3.0, 4.0]  # the warm-up is not among them


def test_each_begins_and_follows_each_of_the_others():
    order, _ = rounds(40)
    assert {one[0] for one in order} == {*'abc'}
    follows = {one[place : place + 2] for one in order for place in (0, 1)}
    assert follows == {'ab', 'ac', 'ba', 'bc', 'ca', 'cb'}
    assert rounds(40)[0] == order  # in each run


def test_no_turns_are_refused():
    with pytest.raises(ValueError, match='plans >= 1 and warmup >= 0, got 0 and 2'):
        turns.take_turns({}, 0, 2)


def test_the_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians():
    ours, theirs = [1.0, 2.0, 10.0], [3.0, 4.0, 10.0]
    found = turns.ratio(ours, theirs)
    assert found['ratio'] == 2.0 != np.median(theirs) / np.median(ours) * 1.01
    assert turns.ratio(theirs, ours)['ratio'] == 0.5
    assert found['ratio_fastest'] == pytest.approx(3.1 / 1.1)
    assert turns.ratio([2.0, 1.0, 10.0], theirs)['ratio'] == 1.5  # other pairs
    with pytest.raises(ValueError, match='pairs of 3 and 2'):
        turns.ratio(ours, theirs[:2])


def test_a_comparison_keeps_both_sides_and_the_stages_that_both_have():
    ours = [Turn(ms=4.0, timings={'vision': 1.0, 'prefill': 1.0})] * 3
    theirs = [Turn(ms=8.0, timings={'vision': 2.0, 'prefill': 4.0})] * 3
    found = turns.versus(ours, theirs, ('vision', 'prefill'))
    assert (found['ratio'], found['vision_prefill']['ratio'], found['pairs']) == (2.0, 3.0, 3)
    assert found['ours']['p99_ms'] == 4.0 and found['theirs']['p50_ms'] == 8.0
    bare = [Turn(ms=8.0)] * 3
    assert 'vision_prefill' not in turns.versus(ours, bare, ('vision', 'prefill'))


def test_answers_are_held_against_each_other_point_by_point():
    line = np.zeros((3, 2))
    ours = [Turn(ms=1.0, xy=line, views=('front',)), Turn(ms=1.0, xy=line, views=('front',))]
    moved = line + [[0, 0], [0, 0], [3, 4]]
    theirs = [Turn(ms=1.0, xy=line, views=('front',)), Turn(ms=1.0, xy=moved, views=('back',))]
    found = turns.apart(ours, theirs)
    assert found['trajectory_max_m'] == 5.0 and found['views_equal_share'] == 0.5
    assert turns.apart(ours, ours)['trajectory_max_m'] == 0.0

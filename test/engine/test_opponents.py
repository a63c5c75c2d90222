import sys

import numpy as np
import pytest

from mose_ros.engine.opponents import Opponent, OpponentError

GOOD = """
import sys
import numpy as np
from mose_ros.engine.opponents import serve
from mose_ros.engine.turns import Turn

def plan(index):
    print('a library that talks')  # not to the parent
    if index == 13:
        raise RuntimeError('no memory')
    return Turn(ms=2.0 + index, xy=np.full((3, 2), float(index)), views=('front', 'back'))

sys.exit(serve(lambda: ({'versions': {'torch': '0'}}, plan)))
"""
READY = 'import sys, time; print(\'{"ready": {}}\', flush=True); '


def child(code, **seconds):
    return Opponent('rival', [sys.executable, '-c', code], **seconds)


def test_an_opponent_answers_with_time_and_trajectory():
    rival = child(GOOD)
    assert rival.facts == {'versions': {'torch': '0'}}
    turn = rival.plan(7)
    assert turn.ms == 9.0 and turn.views == ('front', 'back')
    np.testing.assert_array_equal(turn.xy, np.full((3, 2), 7.0))
    assert rival.plan(8).ms == 10.0
    rival.close()


def test_what_an_opponent_fails_with_is_told():
    rival = child(GOOD)
    with pytest.raises(OpponentError, match='rival, .*says: RuntimeError: no memory'):
        rival.plan(13)
    rival.close()


def test_a_missing_program_is_told_with_its_last_words():
    with pytest.raises(OpponentError, match='(?s)rival.*died with status 1.*No module named'):
        child('import no_such_module')


@pytest.mark.parametrize(
    ('answer', 'message'),
    [
        ('sys.exit(3)', 'died with status 3'),
        ("print('Hello'); time.sleep(9)", "answers nonsense: b'Hello'"),
        ('print(17); time.sleep(9)', 'answers without ms, xy, views'),
        ('print(\'{"ms": 1}\'); time.sleep(9)', 'answers without ms, xy, views'),
        ('print(\'{"ms": -1, "xy": [[0, 0]], "views": []}\')', 'nonsense: -1.0 ms'),
        ('print(\'{"ms": 1, "xy": [[NaN, 0]], "views": []}\')', 'answers nonsense'),
        ('print(\'{"ms": "x", "xy": [[0, 0]], "views": []}\')', 'answers nonsense'),
        ('time.sleep(9)', 'has not answered within 1 s'),
    ],
)
def test_nonsense_is_not_taken_for_a_figure(answer, message):
    rival = child(f'{READY}sys.stdin.readline(); {answer}; sys.stdout.flush()', answer=1.0)
    with pytest.raises(OpponentError, match=message):
        rival.plan(0)
    rival._process.kill()
    rival.close()

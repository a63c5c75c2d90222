"""Talking to a program that is measured beside the engine, in a process of its own: the engine imports nothing of it.

The protocol, one JSON object a line:

    child  -> {"ready": {...}}                     once, when it can plan; what it is made of: versions, compile_s, ...
    parent -> {"plan": 17}                         plan on the observation of this number (`scenery.Scenery`)
    child  -> {"ms": 31.2, "xy": [[x, y], ...], "views": ["front", ...]}     from its pictures to its trajectory
    child  -> {"error": "..."}                     instead of either; it then ends

The child ends when its input does. Its standard error is kept and quoted when it dies. `serve` is the child's side.
"""

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

import numpy as np

from mose_ros.engine.turns import Turn

START = 1800.0  # s until a child is ready: it may compile
ANSWER = 120.0  # s for a plan


class OpponentError(ValueError):
    """A compared program that died, was silent or answered nonsense; the message names it and quotes its last words."""


class Opponent:
    """A compared program."""

    def __init__(
        self, name: str, command: Sequence[str], *, start: float = START, answer: float = ANSWER
    ):
        """Start it and wait until it is ready; seconds that it may take to start and to answer."""
        self.name, self._answer = name, answer
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        self._buffer = b''
        os.set_blocking(self._process.stdout.fileno(), False)
        try:
            self.facts: Mapping[str, Any] = self._listen(start, 'ready')['ready']
        except BaseException:
            self.close()
            raise

    def plan(self, index: int) -> Turn:
        """Return its answer to an observation."""
        try:
            self._process.stdin.write(json.dumps({'plan': index}).encode() + b'\n')
            self._process.stdin.flush()
        except OSError:
            raise self._failed('does not listen any more') from None
        answer = self._listen(self._answer, 'ms', 'xy', 'views')
        try:
            ms, xy = float(answer['ms']), np.asarray(answer['xy'], np.float64)
            views = tuple(map(str, answer['views']))
        except (TypeError, ValueError) as error:
            raise self._failed(f'answers nonsense ({error})') from None
        if not (np.isfinite(ms) and ms > 0 and xy.ndim == 2 and np.isfinite(xy).all()):
            raise self._failed(f'answers nonsense: {ms} ms, a trajectory of shape {xy.shape}')
        return Turn(ms=ms, xy=xy, views=views)

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _listen(self, seconds: float, *keys: str) -> dict[str, Any]:
        line = self._line(seconds)
        try:
            answer = json.loads(line)
        except ValueError:
            raise self._failed(f'answers nonsense: {line[:80]!r}') from None
        if isinstance(answer, dict) and 'error' in answer:
            raise self._failed(f'says: {answer["error"]}')
        if not (isinstance(answer, dict) and set(keys) <= answer.keys()):
            raise self._failed(f'answers without {", ".join(keys)}: {line[:80]!r}')
        return answer

    def _line(self, seconds: float) -> bytes:
        end = monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b'\n' not in self._buffer:
                if not selector.select(max(0.0, end - monotonic())):
                    raise self._failed(f'has not answered within {seconds:.0f} s')
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    code = self._process.wait()
                    raise self._failed(f'has died with status {code}')
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b'\n')
        return line

    def _failed(self, what: str) -> OpponentError:
        self._errors.seek(0)
        last = self._errors.read().decode(errors='replace').strip().splitlines()[-6:]
        words = '\n  '.join(['; its last words:', *last]) if last else ''
        return OpponentError(f'{self.name}, which is compared, {what}{words}')


def serve(start: Callable[[], tuple[Mapping[str, Any], Callable[[int], Turn]]]) -> int:
    """Be the child: get ready, answer until the input ends; return the exit status.

    start: returns what `ready` says and the function that plans. What anybody prints goes to standard error.
    """
    wire = os.fdopen(os.dup(1), 'w', encoding='utf-8')
    os.dup2(2, 1)

    def say(message):
        wire.write(json.dumps(message) + '\n')
        wire.flush()

    try:
        facts, plan = start()
        say({'ready': dict(facts)})
        for line in sys.stdin:
            turn = plan(int(json.loads(line)['plan']))
            say({'ms': turn.ms, 'xy': turn.xy.tolist(), 'views': list(turn.views)})
    except Exception as error:  # the edge of the process: the parent must hear of it
        say({'error': f'{type(error).__name__}: {error}'})
        raise
    return 0

"""One function on many items, on a few threads at once. Worth it where the function leaves Python, as OpenCV and ONNX Runtime do."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any


class Team:
    """The caller's thread and some more, which wait for work and end when nobody holds the team."""

    def __init__(self, threads: int, name: str):
        """Take at most so many threads, the caller's among them."""
        self._helpers = ThreadPoolExecutor(threads - 1, name) if threads > 1 else None
        self.threads = threads

    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], threads: int | None = None
    ) -> list[Any]:
        """Return what the function makes of each item, in their order; whoever is free takes the next one.

        threads: fewer than the team has. What the function raises is raised here, once nobody works any more.
        """
        answers: list[Any] = [None] * len(items)
        left = iter(range(len(items)))  # the interpreter hands out each number once

        def work():
            for index in left:
                answers[index] = function(items[index])

        most = min(threads or self.threads, self.threads, len(items))
        asked = [self._helpers.submit(work) for _ in range(most - 1)]
        try:
            work()
        finally:
            wait(asked)
        for one in asked:
            one.result()
        return answers

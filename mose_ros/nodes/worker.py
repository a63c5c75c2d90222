"""One thread that works on the newest input; what waits while it is busy is replaced, never queued."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from mose_ros.core.process import lower_priority

T = TypeVar('T')


class Worker(Generic[T]):
    """Calls `work(item)` in a thread of its own for the newest item offered.

    The executor's thread stays free for callbacks, and numpy, OpenCV and ONNX Runtime release the GIL while they compute.
    An exception goes to `failed` and ends nothing: the next item gets its chance.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[T], None],
        failed: Callable[[Exception], None],
        nice: int = 0,
    ):
        self._work, self._failed, self._nice = work, failed, nice
        self._item: T | None = None
        self._wake = threading.Condition()
        self._is_closing = False
        self.busy = False
        self.dropped = 0  # items that were replaced before their turn came
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def offer(self, item: T) -> None:
        """Have this item worked on next, in place of one that still waits."""
        with self._wake:
            self.dropped += self._item is not None
            self._item = item
            self._wake.notify()

    def clear(self) -> None:
        """Forget the item that waits."""
        with self._wake:
            self._item = None

    def close(self, timeout_s: float = 2.0) -> None:
        """End the thread after the item it is working on."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        if self._nice:
            lower_priority(self._nice)
        while True:
            with self._wake:
                self.busy = False
                self._wake.wait_for(lambda: self._item is not None or self._is_closing)
                if self._is_closing:
                    return
                item, self._item = self._item, None
                self.busy = True
            try:
                self._work(item)
            except Exception as error:  # the edge of the node: report it, keep the thread
                self._failed(error)

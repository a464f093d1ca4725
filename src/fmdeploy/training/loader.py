"""Batches made in the background while the network computes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

BatchT = TypeVar("BatchT")
POLL_S = 0.1


class Prefetcher(Generic[BatchT]):
    """Calls `make` for one key after the other in a thread and hands the results out in order.

    `make` should stay in numpy: torch would start a second team of threads there and the two would fight for the
    cores. An error in the thread is raised by the next `take`.

    Attributes:
        waited_s: Seconds that `take` spent waiting.
    """

    def __init__(self, make: Callable[[int], BatchT], keys: Iterator[int], *, depth: int = 2) -> None:
        self.waited_s = 0.0
        self._ready: queue.Queue[BatchT | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, keys), daemon=True, name="prefetch")
        self._thread.start()

    def take(self) -> BatchT:
        """The next batch."""
        started = time.perf_counter()
        found = self._ready.get()
        self.waited_s += time.perf_counter() - started
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        self._thread.join()

    def _run(self, make: Callable[[int], BatchT], keys: Iterator[int]) -> None:
        try:
            for key in keys:
                if not self._put(make(key)):
                    return
            self._put(StopIteration("no more batches"))
        except BaseException as error:
            self._put(error)

    def _put(self, value: BatchT | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(value, timeout=POLL_S)
                return True
            except queue.Full:
                continue
        return False

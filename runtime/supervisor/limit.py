"""A limit on one run, for backends that can be interrupted between two operations.

`RunOptions.terminate` ends an endless ONNX loop without the loss of the process. It does nothing inside one long
operation: there only the parent's SIGKILL helps, which comes later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

NS_PER_MS = 1_000_000


class RunLimit:
    """A thread that looks at the run in progress a few times within the limit."""

    def __init__(self, terminate: Callable[[], None], limit_ms: float) -> None:
        """Call `terminate`, from another thread, when a run takes longer than `limit_ms`."""
        self._terminate, self._limit_ns = terminate, limit_ms * NS_PER_MS
        self._began_ns: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fmdeploy-run-limit", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Note that a run begins."""
        self._began_ns = time.monotonic_ns()

    def end(self) -> None:
        """Note that it came back."""
        self._began_ns = None

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._limit_ns / 4e9):
            began = self._began_ns
            if began is not None and time.monotonic_ns() - began > self._limit_ns:
                self._terminate()

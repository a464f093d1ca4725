"""The bounded queue between the event loop and the thread that runs the model."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from fmdeploy.runtime.frame import Frame, Reason
from fmdeploy.runtime.serve.errors import RequestError
from fmdeploy.runtime.serve.request import InferRequest


@dataclass(eq=False)
class Job:
    """One frame that waits, and who waits for it.

    Attributes:
        request: The frame.
        answer: Receives the published frame, or the exception that there is instead.
        is_gone: Whether the client closed the connection.
        arrived_ns: When the request was complete.
        started_ns: When the runtime took it; 0 before.
    """

    request: InferRequest
    answer: asyncio.Future[Frame]
    is_gone: Callable[[], bool]
    arrived_ns: int = field(default_factory=time.monotonic_ns)
    started_ns: int = 0

    @property
    def waited_ms(self) -> float:
        """How long it waited for the runtime."""
        return (self.started_ns - self.arrived_ns) / 1e6

    def finish(self, result: Frame | BaseException) -> None:
        """Answer from any thread. An event loop that is gone has nobody who waits."""
        with suppress(RuntimeError):
            self.answer.get_loop().call_soon_threadsafe(self.settle, result)

    def settle(self, result: Frame | BaseException) -> None:
        """Answer in the event loop."""
        if self.answer.done():
            return
        if isinstance(result, BaseException):
            self.answer.set_exception(result)
        else:
            self.answer.set_result(result)


class WaitingLine:
    """At most `size` jobs; a newer one takes the place of the oldest, since old perception is worth less.

    `put` is called in the event loop only, `get` and `put_back` from any thread.
    """

    def __init__(self, size: int) -> None:
        self.size, self.num_dropped = size, 0
        self._jobs: deque[Job] = deque()
        self._tokens: SimpleQueue[None] = SimpleQueue()  # as many as there are jobs: waits without a lock in Python

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job) -> Job | None:
        """Append a job and return the one that was dropped for it."""
        dropped = None
        if len(self._jobs) >= self.size:
            try:
                dropped = self._jobs.popleft()  # its token now stands for the new job
            except IndexError:  # a thread was faster: there is room
                dropped = None
        self._jobs.append(job)
        if dropped is None:
            self._tokens.put(None)
            return None
        self.num_dropped += 1
        dropped.settle(RequestError(503, "the queue was full and a newer frame took this one's place",
                                    reasons=(Reason.DROPPED,)))
        return dropped

    def get(self, timeout_s: float) -> Job | None:
        """Take the oldest job; None when none came in time."""
        try:
            self._tokens.get(timeout=timeout_s)
            return self._jobs.popleft()
        except (Empty, IndexError):
            return None

    def put_back(self, job: Job) -> None:
        """Return the oldest job: somebody else shall take it."""
        self._jobs.appendleft(job)
        self._tokens.put(None)

    def refuse_all(self, error: RequestError) -> None:
        """Answer everybody who waits."""
        while self._jobs:
            self._jobs.popleft().settle(error)

"""`ServedModel`: one thread that makes a runtime, serves the waiting line with it, and closes it.

A runtime belongs to one thread from its birth to its end: calls are serial anyway, and the worker process of a
supervised runtime dies with the thread that started it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from fmdeploy.errors import FmdeployError, FrameError
from fmdeploy.runtime.frame import Frame, Reason
from fmdeploy.runtime.health import PerceptionRuntime
from fmdeploy.runtime.serve.errors import RequestError, not_ready
from fmdeploy.runtime.serve.line import Job, WaitingLine

IDLE_S = 0.25  # how often a thread without frames looks up: polls the runtime, or sees that it shall stop
NS_PER_MS = 1_000_000

Start = Callable[[], PerceptionRuntime]
"""Raises where the bundle or the machine does not allow a runtime."""


class ServedModel:
    """A runtime behind a waiting line.

    Attributes:
        runtime: What serves; None until it is ready, and when it could not start.
        failure: Why it could not start.
        settled: Set when one of the two is known.
    """

    def __init__(
        self, start: Start, line: WaitingLine, published: Callable[[Job | None, Frame], Frame], *,
        deadline_ms: float | None = None,
    ) -> None:
        """Prepare a thread; `begin` starts it.

        Args:
            start: Makes the runtime, in the thread.
            line: Where the frames wait.
            published: Sees every frame in the thread and returns what to answer; the job is None where nobody asked.
            deadline_ms: For frames that bring no deadline.
        """
        self.runtime: PerceptionRuntime | None = None
        self.failure: Exception | None = None
        self.settled = threading.Event()
        self._start, self._line, self._published, self._deadline_ms = start, line, published, deadline_ms
        self._serve, self._stop, self._replaced = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._main, name="fmdeploy-model", daemon=True)

    def begin(self) -> None:
        """Load, verify and self-test, in the thread."""
        self._thread.start()

    def serve(self) -> None:
        """Take frames from the line from now on."""
        self._serve.set()

    def stop(self, *, replaced: bool = False) -> None:
        """Finish the frame at hand, then close the runtime.

        Args:
            replaced: Another model serves now: the service manager must not hear that the service stops.
        """
        self._replaced = replaced
        self._stop.set()
        self._serve.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end of the thread; False when it is stuck in a frame."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            runtime = self._start()
            self.runtime = runtime
        except Exception as error:  # told to whoever waits for `settled`
            self.failure = error
            return
        finally:
            self.settled.set()
        try:
            self._serve.wait()
            while not self._stop.is_set():
                job = self._line.get(IDLE_S)
                if job is None:
                    self._poll(runtime)
                elif self._stop.is_set():  # replaced while it waited: a new frame is the new model's
                    self._line.put_back(job)
                else:
                    self._run(runtime, job)
        finally:
            if self._replaced and (notifier := getattr(runtime, "notifier", None)) is not None:
                notifier.close()
            runtime.close()

    def _poll(self, runtime: PerceptionRuntime) -> None:
        with suppress(Exception):  # a poll that fails is seen in the health; it must not end the thread
            frame = runtime.poll()
            if frame is not None:
                self._published(None, frame)

    def _run(self, runtime: PerceptionRuntime, job: Job) -> None:
        job.started_ns = time.monotonic_ns()
        if job.answer.done() or job.is_gone():
            job.finish(not_ready("the client went away"))
            return
        try:
            job.finish(self._published(job, infer(runtime, job, self._deadline_ms)))
        except RequestError as error:
            job.finish(error)
        except FrameError as error:
            job.finish(RequestError(400, str(error)))
        except FmdeployError as error:
            job.finish(RequestError(503, str(error), reasons=(Reason.NOT_READY,)))
        except Exception as error:  # a bug here is one failed request, and perception goes on
            text = str(error).splitlines()[0] if str(error) else ""
            job.finish(RequestError(500, f"{type(error).__name__}: {text}"[:500], reasons=(Reason.BACKEND_ERROR,)))


def infer(runtime: PerceptionRuntime, job: Job, deadline_ms: float | None = None) -> Frame:
    """Run one job's frame, with this deadline where it brings none.

    Raises:
        RequestError: Its deadline passed in the queue.
        FrameError: The structure of its inputs.
    """
    request, waited_ms = job.request, job.waited_ms
    deadline_ms = deadline_ms if request.deadline_ms is None else request.deadline_ms
    if deadline_ms is not None and request.stamp_ns is None:
        if waited_ms >= deadline_ms:  # a frame without a stamp is as old as its wait
            raise RequestError(503, f"waited {waited_ms:.1f} ms for the model, deadline {deadline_ms:g} ms",
                               reasons=(Reason.LATE,))
        deadline_ms -= waited_ms
    return runtime.infer(request.inputs, stamp_ns=request.stamp_ns, deadline_ms=deadline_ms, layouts=request.layouts,
                         missing=request.missing)

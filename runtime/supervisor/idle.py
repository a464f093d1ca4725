"""What proves that inference works while no frames come: the golden inputs, run now and then.

They run in the loop that runs frames, so they count as progress: only what was really completed kicks the watchdog.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fmdeploy.runtime.publisher import Publisher
from fmdeploy.runtime.state import EventKind, State
from fmdeploy.runtime.supervisor.fleet import Fleet
from fmdeploy.runtime.supervisor.notify import Notifier
from fmdeploy.runtime.supervisor.process import WorkerLostError, WorkerProcess

NS_PER_MS = 1_000_000
TESTS_A_WATCHDOG_INTERVAL = 3


class IdleTest:
    """Looks for idle time, once a round of the monitor."""

    def __init__(
        self, fleet: Fleet, publisher: Publisher, notifier: Notifier, frames: threading.Lock,
        tell: Callable[[EventKind, str], None], *, after_ms: float, bound_ms: float,
    ) -> None:
        """Make one.

        Args:
            fleet: Whose serving worker is tested.
            publisher: Knows the state.
            notifier: Hears of progress.
            frames: Held by whoever runs a frame.
            tell: Takes what the state machine must hear.
            after_ms: Idle time before a test; 0: only as the watchdog demands.
            bound_ms: Time that a test may take.
        """
        self._fleet, self._publisher, self._notifier = fleet, publisher, notifier
        self._frames, self._tell, self._sample = frames, tell, 0
        limits = after_ms * NS_PER_MS, notifier.interval_ns / TESTS_A_WATCHDOG_INTERVAL
        self._after_ns = min((limit for limit in limits if limit), default=None)
        self._bound_ns, self._active_ns = int(bound_ms * NS_PER_MS), time.monotonic_ns()

    def note_progress(self) -> None:
        """Something was completed just now."""
        self._active_ns = time.monotonic_ns()
        self._notifier.progress()

    def step(self, now_ns: int) -> None:
        """Run the next golden sample where nothing else has run for too long."""
        if self._publisher.state is State.SAFE_OUTPUT:
            # The one exception: a latch is meant to last until the operator comes; a restart by systemd would open it.
            self._notifier.progress()
            return
        if self._after_ns is None or now_ns - self._active_ns < self._after_ns:
            return
        if self._frames.acquire(blocking=False):
            try:
                worker = self._fleet.serving()
                if worker is not None:
                    self._test(worker)
            finally:
                self._frames.release()

    def _test(self, worker: WorkerProcess) -> None:
        try:
            # One sample: it takes no longer than a frame, which has the same bound, and a frame that comes now waits
            # for one run, not for all samples.
            self._sample += 1
            answer = worker.ask({"ask": "self_test", "sample": self._sample}, time.monotonic_ns() + self._bound_ns)
        except WorkerLostError as lost:
            self._fleet.report_loss(worker, lost.detail)
            return
        passed = "report" in answer and answer["report"]["admitted"]
        why = answer.get("error") or answer["report"]["reason"]
        self._tell(EventKind.SELF_TEST_PASSED if passed else EventKind.SELF_TEST_FAILED, why)
        self.note_progress()

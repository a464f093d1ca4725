"""The thread that watches the workers, the memory and the idle time, while callers only run frames.

It says that it came round; when it does not any more, frames are UNMONITORED and invalid. A mistake in here ends the
thread, which is then seen: a monitor that swallows its own errors would be no monitor.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable

from fmdeploy.runtime.state import EventKind
from fmdeploy.runtime.supervisor.config import Supervision
from fmdeploy.runtime.supervisor.events import EventLog
from fmdeploy.runtime.supervisor.fleet import Fleet
from fmdeploy.runtime.supervisor.watch import Floor

NS_PER_MS = 1_000_000
MEMORY_PERIOD_NS = 500 * NS_PER_MS


class Monitor:
    """A thread that comes round every `monitor_ms`, and at once when a worker's socket closes.

    Attributes:
        came_round_ns: When it last came round.
        floor: What it knows of the machine's memory.
    """

    def __init__(
        self, fleet: Fleet, config: Supervision, tell: Callable[[EventKind, str], None], idle: Callable[[int], None],
        log: EventLog,
    ) -> None:
        """Watch a fleet; `idle` is called every round, for what has to be done when no frames come."""
        self.fleet, self.config, self.floor = fleet, config, Floor(config.memory)
        self.came_round_ns = time.monotonic_ns()
        self._tell, self._idle, self._log = tell, idle, log
        self._looked_ns = 0
        self._wake, self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), False
        self._thread = threading.Thread(target=self._run, name="fmdeploy-monitor", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.came_round_ns = time.monotonic_ns()
        self._thread.start()

    def is_watching(self) -> bool:
        """Whether it came round lately."""
        silent_ns = time.monotonic_ns() - self.came_round_ns
        return silent_ns < self.config.unmonitored_ms * NS_PER_MS and self._thread.is_alive()

    def wake(self) -> None:
        """Have it come round now."""
        with contextlib.suppress(OSError, ValueError):  # it has ended
            os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """End the thread."""
        self._ended = True
        self.wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(5.0)
        if not self._thread.is_alive() and self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def _run(self) -> None:
        while not self._ended:
            now = self.came_round_ns = time.monotonic_ns()
            self.fleet.step(now)
            if now - self._looked_ns >= MEMORY_PERIOD_NS:
                self._looked_ns = now
                self._look_at_memory()
            self._idle(now)
            self._wait()

    def _wait(self) -> None:
        """Wait one period, or until a worker dies or says that it is ready."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for worker in self.fleet.workers():
            # Packets of a worker that serves are its caller's; that it hung up is reported anyway.
            poll.register(worker.channel.doorbell, select.POLLIN if worker.ready is None else 0)
        poll.poll(self.config.monitor_ms)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _look_at_memory(self) -> None:
        was, low = self.floor.low, self.floor.look()
        self.fleet.memory_low = low
        if low == was:
            return
        text = f"{self.floor.available_mib} MiB available, floor {self.config.memory.floor_mib:g} MiB"
        self._log.write("memory low" if low else "memory ok", available_mib=self.floor.available_mib)
        self._tell(EventKind.MEMORY_LOW if low else EventKind.MEMORY_OK, text)
        if not low:
            self.fleet.plan_standby()

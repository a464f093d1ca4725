"""One place that a worker holds: its holder, its predecessor, its losses and its growth."""

from __future__ import annotations

from dataclasses import dataclass

from fmdeploy.runtime.supervisor.config import Supervision
from fmdeploy.runtime.supervisor.notes import Setup
from fmdeploy.runtime.supervisor.process import WorkerProcess
from fmdeploy.runtime.supervisor.restarts import Restarts
from fmdeploy.runtime.supervisor.watch import Growth

NS_PER_MS = 1_000_000


@dataclass
class Post:
    """A place for a worker.

    Attributes:
        name: `primary` or `standby`.
        setup: What its workers are told.
        restarts: Its losses.
        worker: Who holds it, loading or ready.
        retiring: Former holder, which serves until the new one is ready.
        due_ns: When a worker is to be started; None: not planned.
        growth: RSS of the holder.
        num_vacated: How often everybody was sent away.
    """

    name: str
    setup: Setup
    restarts: Restarts
    worker: WorkerProcess | None = None
    retiring: WorkerProcess | None = None
    due_ns: int | None = None
    growth: Growth | None = None
    num_vacated: int = 0

    def holder(self) -> WorkerProcess | None:
        """Who may take frames: the worker when it is ready, else the one it is to replace."""
        return next((worker for worker in (self.worker, self.retiring) if is_ready(worker)), None)

    def holders(self) -> list[WorkerProcess]:
        """All processes of this place."""
        return [worker for worker in (self.worker, self.retiring) if worker is not None]

    def replace(self, now_ns: int) -> None:
        """Have a new worker started; the present one serves until that is ready."""
        if self.retiring is None:
            self.retiring, self.worker = self.worker, None
        self.due_ns = now_ns

    def vacate(self) -> list[WorkerProcess]:
        """Forget everybody, and whatever was planned."""
        gone = self.holders()
        self.num_vacated += 1
        self.worker = self.retiring = self.due_ns = self.growth = None
        return gone


def is_ready(worker: WorkerProcess | None) -> bool:
    """Whether it may take frames."""
    return worker is not None and worker.ready is not None and not worker.lost


def complaint(worker: WorkerProcess, config: Supervision, now_ns: int) -> str:
    """Why this worker must go; empty where all is well."""
    if worker.lost:
        return worker.lost
    if worker.exit_code() is not None:
        return f"the worker died: {worker.exit_text()}"
    if worker.ready is None:
        late = now_ns - worker.started_ns > config.start_timeout_ms * NS_PER_MS
        return "the worker was not ready in time" if late else ""
    beat = worker.channel.heartbeat()
    silent_ms = (now_ns - beat.at_ns) / NS_PER_MS
    # A frame in progress is bounded by its caller, a self-test by whoever asked for it.
    if beat.busy is None and silent_ms > config.silent_ms:
        return f"no heartbeat for {silent_ms:.0f} ms"
    return ""

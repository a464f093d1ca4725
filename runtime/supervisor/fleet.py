"""The workers: a primary with the best tiers, and a standby with the last one, loaded and waiting.

The frame after a loss goes to whoever is ready, so a fault costs the frame that met it. The killer frame itself is not
tried again: it might kill the standby, too. A tier is changed by starting a worker that proves itself on it, never
inside one that serves. Nothing that a caller of `infer` does here waits for a process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from fmdeploy.errors import ArtifactError, FmdeployError, MissingError, ModelFileError
from fmdeploy.iospec import IOSpec
from fmdeploy.runtime.state import EventKind
from fmdeploy.runtime.supervisor.config import Supervision
from fmdeploy.runtime.supervisor.events import EventLog
from fmdeploy.runtime.supervisor.post import Post, complaint
from fmdeploy.runtime.supervisor.process import WorkerProcess
from fmdeploy.runtime.supervisor.watch import Growth

ERRORS = {kind.__name__: kind for kind in (ArtifactError, MissingError, ModelFileError)}
Tell = Callable[[EventKind, str], None]


class Fleet:
    """Workers and their restarts.

    Attributes:
        primary: Holds the best tiers.
        standby: Holds the last tier; None: there is none.
        first_tier: The tier that was chosen at the start.
        memory_low: No standby is started while it is true.
        prefer_standby: The primary's tier failed: the standby serves although the primary is there.
        num_losses: Workers that died or were killed.
    """

    def __init__(
        self, io: IOSpec, config: Supervision, primary: Post, standby: Post | None, tell: Tell, log: EventLog
    ) -> None:
        """Make a fleet; `tell` takes what the state machine must hear."""
        self.primary, self.standby, self.first_tier = primary, standby, ""
        self.memory_low, self.prefer_standby, self.num_losses = False, False, 0
        self._io, self._config, self._tell, self._log = io, config, tell, log
        self._lock = threading.RLock()
        self._serving: WorkerProcess | None = None
        self._ended: list[WorkerProcess] = []

    def start(self) -> WorkerProcess:
        """Start the primary and wait for it.

        Raises:
            ModelFileError: No tier passes.
            FmdeployError: The worker died, or did not become ready in time.
        """
        worker = self.primary.worker = self._spawn(self.primary)
        end = time.monotonic() + self._config.start_timeout_ms / 1000
        while not worker.take_news(100.0) and not worker.lost and time.monotonic() < end:
            pass
        if worker.ready is None or worker.lost:
            failed, why = worker.failed, worker.lost or "the worker was not ready in time"
            worker.close()
            raise _start_error(failed, why)
        self.first_tier = str(worker.ready["tier"])
        self._welcome(self.primary, worker)
        self._choose()
        return worker

    def posts(self) -> Iterator[Post]:
        """All posts, best first."""
        yield self.primary
        if self.standby is not None:
            yield self.standby

    def serving(self) -> WorkerProcess | None:
        """Whoever takes the next frame; None when nobody is ready."""
        worker = self._serving
        return worker if worker is not None and not worker.lost else None

    def workers(self) -> list[WorkerProcess]:
        """All processes that are alive or not yet known to be dead."""
        with self._lock:
            return [worker for post in self.posts() for worker in post.holders()]

    def report_loss(self, worker: WorkerProcess, why: str) -> None:
        """Kill a worker and let whoever is ready serve."""
        with self._lock:
            worker.lose(why)
            self._bury(worker)

    def step(self, now_ns: int) -> None:
        """Take news of workers that load, find the dead, the silent and the grown, and start what is due."""
        due = []
        with self._lock:
            for post in self.posts():
                for worker in post.holders():
                    self._look_at(post, worker, now_ns)
                if post.due_ns is not None and now_ns >= post.due_ns and not self._must_wait(post):
                    post.due_ns = None
                    if post.worker is None:  # else it was planned a second time while the first was being started
                        due.append((post, post.num_vacated))
            self._choose()
        for post, num_vacated in due:
            worker = self._spawn(post)
            with self._lock:
                if post.num_vacated == num_vacated:
                    post.worker = worker
                else:  # everybody was dismissed meanwhile: after a reset it would stand in the way of a new one
                    worker.lose("dismissed while it was started")
                    self._ended.append(worker)
        self._reap()

    def plan_standby(self) -> None:
        """Have a standby, memory allowing."""
        with self._lock:
            post = self.standby
            if post is not None and post.worker is None and post.due_ns is None:
                post.due_ns = time.monotonic_ns()

    def plan_start(self) -> None:
        """Have a primary, after the pause that its losses demand."""
        with self._lock:
            if self.primary.worker is None and self.primary.due_ns is None:
                self.primary.due_ns = self.primary.restarts.next_start_ns(time.monotonic_ns())

    def plan_next_tier(self, tiers: tuple[str, ...]) -> None:
        """Serve with a later tier: the standby's, or one of `tiers` in a new primary."""
        with self._lock:
            if self.standby is not None and self.standby.holder() is not None:
                self.prefer_standby = True
                self._choose()
            elif tiers and self.primary.retiring is None:
                self.primary.setup = replace(self.primary.setup, tiers=tiers)
                self.primary.replace(time.monotonic_ns())

    def plan_first_tier(self, tiers: tuple[str, ...]) -> None:
        """Let a new primary prove itself on all tiers; it serves when it is ready."""
        with self._lock:
            if self.primary.retiring is None and self.primary.due_ns is None:
                self.primary.setup = replace(self.primary.setup, tiers=tiers)
                self.primary.replace(time.monotonic_ns())

    def release_standby(self) -> None:
        """Give the memory of an idle standby back."""
        with self._lock:
            if self.standby is not None and self._serving not in self.standby.holders():
                for worker in self.standby.vacate():
                    self._retire(worker, "the machine is short of memory")

    def dismiss(self, why: str) -> None:
        """Kill everybody, without waiting for the end."""
        with self._lock:
            self._serving = None
            for post in self.posts():
                for worker in post.vacate():
                    worker.lose(why)
                    self._ended.append(worker)

    def stop(self, grace_s: float) -> bool:
        """End everybody; whoever runs a frame gets so many seconds. Return whether nobody had to be killed."""
        with self._lock:
            self._serving = None
            workers = [worker for post in self.posts() for worker in post.vacate()]
        for worker in workers:
            worker.hang_up()
        end, clean = time.monotonic() + grace_s, True
        for worker in workers:
            clean &= worker.wait(max(end - time.monotonic(), 0.0)) == 0
        for worker in (*workers, *self._ended):
            worker.lost = worker.lost or "stopped"
            worker.close()
        self._ended.clear()
        return clean

    def forget(self) -> None:
        """Forget past losses: the operator said so."""
        with self._lock:
            self.prefer_standby = False
            for post in self.posts():
                post.restarts.forget()

    def _look_at(self, post: Post, worker: WorkerProcess, now_ns: int) -> None:
        was_ready = worker.ready is not None
        ready = worker.take_news()
        if why := complaint(worker, self._config, now_ns):
            worker.lose(why)
            self._bury(worker)
        elif ready and not was_ready:
            self._welcome(post, worker)
        elif ready and worker is post.worker and post.retiring is None and self._grown(post, worker):
            post.replace(now_ns)

    def _grown(self, post: Post, worker: WorkerProcess) -> bool:
        growth = post.growth
        if growth is None or not growth.look(worker.channel.heartbeat().completed):
            return False
        self._log.write("planned restart", post=post.name, rss_mib=growth.rss_mib, baseline_mib=growth.baseline_mib)
        return True

    def _welcome(self, post: Post, worker: WorkerProcess) -> None:
        self._log.write("ready", post=post.name, pid=worker.pid, tier=worker.ready and worker.ready["tier"])
        post.growth = Growth(self._config.memory, worker.pid)
        if post.retiring is not None:
            self._retire(post.retiring, "replaced")
            post.retiring = None
        if post is self.primary:
            self.prefer_standby = False

    def _retire(self, worker: WorkerProcess, why: str) -> None:
        """Let it finish its frame and end."""
        self._log.write("retired", pid=worker.pid, reason=why)
        worker.hang_up()
        self._ended.append(worker)

    def _bury(self, worker: WorkerProcess) -> None:
        """Take a dead worker off its post, once, and plan what follows."""
        post = next((post for post in self.posts() if worker in post.holders()), None)
        if post is None:
            return
        self._ended.append(worker)
        self.num_losses += 1
        self._log.write("lost", post=post.name, pid=worker.pid, reason=worker.lost)
        served = worker is self._serving
        if worker is post.retiring:
            post.retiring = None
        else:
            post.worker = post.growth = None
            post.restarts.lost(time.monotonic_ns())
        if served:
            self._serving = None
        if served or post is self.primary:
            self._tell(EventKind.WORKER_LOST, worker.lost)  # its command plans the restart, or latches
            self._choose(again=True)
        if post is self.standby and not post.restarts.exhausted and post.worker is None:
            post.due_ns = post.restarts.next_start_ns(time.monotonic_ns())

    def _choose(self, *, again: bool = False) -> None:
        """Choose who serves, and tell when that changes."""
        if self._serving is not None and self._serving.lost:  # its caller is about to report it
            self._bury(self._serving)
            return
        candidates = [worker for post in self.posts() if (worker := post.holder()) is not None]
        if self.prefer_standby:
            candidates.reverse()
        chosen = candidates[0] if candidates else None
        if chosen is self._serving and not again:
            return
        self._serving = chosen
        if chosen is not None and chosen.ready is not None:
            self._tell(EventKind.WORKER_STARTED, f"pid {chosen.pid}")
            # Its golden vectors passed in its own process before it said that it is ready.
            self._tell(EventKind.SELF_TEST_PASSED, str(chosen.ready["tier"]))
            first = chosen.ready["tier"] == self.first_tier
            self._tell(EventKind.TIER_RESTORED if first else EventKind.TIER_CHANGED, str(chosen.ready["tier"]))

    def _must_wait(self, post: Post) -> bool:
        return post is self.standby and (self.memory_low or self.primary.holder() is None)

    def _spawn(self, post: Post) -> WorkerProcess:
        worker = WorkerProcess(post.setup, self._io, self._config.command)
        self._log.write("started", post=post.name, pid=worker.pid)
        return worker

    def _reap(self) -> None:
        for worker in [worker for worker in self._ended if worker.exit_code() is not None]:
            self._ended.remove(worker)
            worker.close()


def _start_error(failed: dict[str, object] | None, why: str) -> FmdeployError:
    if not failed:
        return FmdeployError(why)
    return ERRORS.get(str(failed["kind"]), FmdeployError)(str(failed["error"]))

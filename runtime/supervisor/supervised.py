"""`SupervisedRuntime`: the interface of `Runtime`, with the model in a process that can be killed.

A caller of `infer` has a frame after `hard_deadline_ms` at the latest, whatever the model, the backend or its driver
does: Python cannot interrupt a running inference, but it can SIGKILL another process. Structure, stamps, deadlines and
validity are judged here; content and outputs in the worker, by the same `Inference` that `Runtime` embeds.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from fmdeploy.arrays import Arrays
from fmdeploy.errors import FmdeployError
from fmdeploy.runtime.bundle import Bundle, open_bundle
from fmdeploy.runtime.frame import Finding, Frame, Reason
from fmdeploy.runtime.guards.config import GuardConfig
from fmdeploy.runtime.guards.content import Guards
from fmdeploy.runtime.guards.sensors import check_rig
from fmdeploy.runtime.health import Health, forked, require_around
from fmdeploy.runtime.inference import Result
from fmdeploy.runtime.loading import Terms
from fmdeploy.runtime.publisher import Clock, Publisher, Ticket
from fmdeploy.runtime.state import Command, EventKind, Policy
from fmdeploy.runtime.supervisor.config import Supervision
from fmdeploy.runtime.supervisor.events import EventLog
from fmdeploy.runtime.supervisor.fleet import Fleet
from fmdeploy.runtime.supervisor.idle import IdleTest
from fmdeploy.runtime.supervisor.monitor import Monitor
from fmdeploy.runtime.supervisor.notes import Setup
from fmdeploy.runtime.supervisor.notify import Notifier
from fmdeploy.runtime.supervisor.post import Post
from fmdeploy.runtime.supervisor.process import WorkerLostError, WorkerProcess
from fmdeploy.runtime.supervisor.restarts import Restarts
from fmdeploy.runtime.tiers import TIERS, TierReport

NS_PER_MS = 1_000_000


class SupervisedRuntime:
    """A verified bundle in a worker process. Calls from several threads are served one after the other."""

    def __init__(
        self,
        bundle: Path | str | Bundle,
        *,
        tiers: Sequence[str] = TIERS,
        threads: int = 1,
        guards: GuardConfig | None = None,
        deadline_ms: float | None = None,
        clock: Clock = time.monotonic_ns,
        policy: Policy | None = None,
        standby: bool = True,
        terms: Terms | None = None,
        rig: Mapping[str, str] | None = None,
        supervision: Supervision | None = None,
    ) -> None:
        """Open the bundle, start a worker, and return when it has admitted a tier.

        Args:
            bundle: Folder of a BUNDLE, or an opened one. Workers open it again, and only with the same digest.
            tiers: Tiers to try, best first.
            threads: Threads inside one run.
            guards: Which guards run; default: all.
            deadline_ms: Age at which a result is discarded; None: never.
            clock: Monotonic nanoseconds; sensor stamps are on this clock.
            policy: Thresholds of the state machine.
            standby: Keep a second worker with the next tier loaded, which takes over at the frame after a loss. It
                costs the memory of one more process; without it frames are invalid until the restart is done.
            terms: Where engines are, and which budgets a tier must hold. An engine that is built at the start needs a
                longer `start_timeout_ms`.
            rig: This vehicle's sensors, name to sha256 of the calibration; None: not compared with the bundle's.
            supervision: How the worker is watched.

        Raises:
            ArtifactError: The bundle is missing or altered.
            ModelFileError: No tier passes.
            FmdeployError: The worker died while it loaded.
        """
        self.bundle, self.config = open_bundle(bundle), supervision or Supervision()
        if rig is not None:
            check_rig(self.bundle.io, rig)
        self._tiers, guards = tuple(tiers), guards or GuardConfig()
        self._guards = Guards.of(self.bundle, guards)
        policy = replace(policy or Policy(), supervised=True)
        self.publisher = Publisher(self.bundle.digest, deadline_ms=deadline_ms, clock=clock, policy=policy)
        self._lock, self._pid, self._closed = threading.Lock(), os.getpid(), False
        self._watched, self.log, self.notifier = True, EventLog(self.config.events), Notifier()
        setup = Setup(
            bundle=str(self.bundle.artifact.root), digest=self.bundle.digest, tiers=self._tiers, threads=threads,
            guards=guards, beat_ms=self.config.beat_ms, terminate_ms=self.config.terminate_ms,
            address_space_mib=self.config.address_space_mib, terms=terms or Terms(),
        )
        self.fleet = Fleet(self.bundle.io, self.config, self._post("primary", setup),
                           self._post("standby", setup) if standby else None, self._tell, self.log)
        self._idle = IdleTest(self.fleet, self.publisher, self.notifier, self._lock, self._tell,
                              after_ms=self.config.idle_self_test_ms, bound_ms=self.config.hard_deadline_ms)
        self.publisher.tell(EventKind.VERIFIED)
        try:
            self._reports = _reports(self.fleet.start())
        except FmdeployError:
            self.notifier.close()
            raise
        self.notifier.ready(f"{self.bundle.digest[:12]} on {self.tier}")  # before a monitor can kick the watchdog
        self.monitor = self._new_monitor()

    @property
    def tier(self) -> str:
        """The tier that serves now, or served last."""
        return self.publisher.health().tier

    @property
    def reports(self) -> tuple[TierReport, ...]:
        """What the first worker found about every tier, in the order they were asked for."""
        return self._reports

    def infer(
        self,
        inputs: Arrays,
        *,
        stamp_ns: int | None = None,
        deadline_ms: float | None = None,
        layouts: Mapping[str, str] | None = None,
        missing: Collection[str] = (),
    ) -> Frame:
        """Judge one frame, have it run, and judge the result; see `Runtime.infer`.

        Returns:
            A frame, after `hard_deadline_ms` at the latest. Without a result it is invalid and says why.

        Raises:
            FrameError: Bad *structure* (type, dtype, shape, layout, names): a mistake in the calling program.
        """
        until_ns = time.monotonic_ns() + int(self.config.hard_deadline_ms * NS_PER_MS)
        if os.getpid() != self._pid:
            raise forked()
        self._guards.structure(inputs, layouts, missing)
        # Half of the time is for its run: a worker must not be killed for the time that others took.
        if not self._lock.acquire(timeout=self.config.hard_deadline_ms / 2000):
            finding = Finding(Reason.DROPPED, "frames of other callers took half of the time until the hard deadline")
            return self.publisher.publish_nothing(finding, stamp_ns)
        try:
            self._check_monitor()
            ticket = self.publisher.arrive(stamp_ns, deadline_ms)
            frame = self.publisher.publish(ticket, self._run(ticket, inputs, missing, until_ns))
        finally:
            self._lock.release()
        self._obey(self.publisher.take_commands())
        return frame

    def poll(self) -> Frame | None:
        """Return an invalid frame where none arrived within the input timeout; to be called once a frame period."""
        self._check_monitor()
        frame = self.publisher.poll()
        self._obey(self.publisher.take_commands())
        return frame

    def health(self) -> Health:
        """Say how it is. The parent lives as long as it answers; a dead worker is a state, not the end."""
        health = self.publisher.health()
        extra = {"losses": self.fleet.num_losses, "log_errors": self.log.num_lost,
                 "notify_errors": self.notifier.num_errors}
        return replace(health, counters={**health.counters, **extra})

    def note(self, kind: EventKind, detail: str = "") -> None:
        """Say what was seen of the machine: heat or memory; see `Runtime.note`."""
        require_around(kind)
        self._tell(kind, detail)

    def reset(self) -> None:
        """The operator unlatches SAFE_OUTPUT: load, self-test, and serve again if it passes."""
        self.log.write("reset")
        self.fleet.forget()
        if not self.monitor.is_watching():
            self.monitor.stop()
            self.monitor = self._new_monitor()
        self._tell(EventKind.RESET, "operator")
        self.monitor.wake()

    def wait_ready(self, seconds: float) -> bool:
        """Wait until frames are run again; return whether they are."""
        end = time.monotonic() + seconds
        while not self.publisher.status.takes_frames and time.monotonic() < end:
            time.sleep(0.005)
        return self.publisher.status.takes_frames

    def close(self, grace_ms: float | None = None) -> dict[str, Any]:
        """Drain and stop: the frame in progress gets the grace time, then its worker is killed.

        Args:
            grace_ms: Default: the hard deadline.

        Returns:
            The shutdown record, which is also the last line of the event file.
        """
        if self._closed:
            return {}
        self._closed = True
        grace_s = (self.config.hard_deadline_ms if grace_ms is None else grace_ms) / 1000
        end = time.monotonic() + grace_s
        self.notifier.stopping()
        self.publisher.tell(EventKind.STOP)
        drained = self._lock.acquire(timeout=grace_s)
        self.monitor.stop()
        clean = self.fleet.stop(max(end - time.monotonic(), 0.0)) and drained
        self.publisher.tell(EventKind.DRAINED)
        record = {"drained": clean, **self.health().to_json()}
        self.log.write("shutdown", **record)
        self.notifier.close()
        if drained:
            self._lock.release()
        return record

    def __enter__(self) -> SupervisedRuntime:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _run(self, ticket: Ticket, inputs: Arrays, missing: Collection[str], until_ns: int) -> Result:
        """Have a frame run by whoever serves; a result without outputs where nobody does."""
        worker = self.fleet.serving()
        if ticket.not_taken or worker is None:
            return self._nothing(() if ticket.not_taken else (Finding(Reason.WORKER_LOST, "no worker is ready"),))
        try:
            result = worker.run(ticket.seq, inputs, missing=missing, refused=ticket.refused, until_ns=until_ns)
        except WorkerLostError as lost:
            self.fleet.report_loss(worker, lost.detail)
            self.monitor.wake()
            findings = [Finding(Reason.WORKER_LOST, lost.detail)]
            if lost.code is Reason.LATE:
                findings.insert(0, Finding(Reason.LATE, f"no result within {self.config.hard_deadline_ms:g} ms"))
            return self._nothing(tuple(findings))
        self._idle.note_progress()
        lost_device = next((found for found in result.findings if found.code is Reason.DEVICE_LOST), None)
        if lost_device is not None:  # the worker ends by itself: its successor gets the device back
            why = f"{worker.exit_text()} after {lost_device.detail}"
            self.fleet.report_loss(worker, why)
            return result._replace(outputs={}, findings=(*result.findings, Finding(Reason.WORKER_LOST, why)))
        return result

    def _nothing(self, findings: tuple[Finding, ...]) -> Result:
        health = self.publisher.health()
        return Result({}, findings, health.tier, health.model, health.provider, {})

    def _check_monitor(self) -> None:
        """Nothing is valid while nobody watches."""
        watched = self.monitor.is_watching()
        if watched != self._watched:
            self._watched = watched
            self.log.write("monitor back" if watched else "monitor lost")
            self._tell(EventKind.MONITOR_BACK if watched else EventKind.MONITOR_LOST, "the monitor does not come round")

    def _tell(self, kind: EventKind, detail: str) -> None:
        worker = self.fleet.serving()
        if worker is not None and worker.ready is not None:
            self.publisher.runs(**{key: worker.ready[key] for key in ("model", "tier", "provider")})
        self._obey(self.publisher.tell(kind, detail))

    def _obey(self, commands: Sequence[Command]) -> None:
        fleet = self.fleet
        for command in commands:
            if command in (Command.RESTART_WORKER, Command.LOAD):
                fleet.plan_start()
            elif command is Command.PREPARE_STANDBY:
                self._prepare_standby()
            elif command is Command.RELEASE_STANDBY:
                fleet.release_standby()
            elif command is Command.USE_NEXT_TIER:
                fleet.plan_next_tier(self._after(self.tier))
            elif command is Command.TRY_BETTER_TIER:
                fleet.plan_first_tier(self._tiers)
            elif command is Command.STOP_WORKER:
                self.log.write("latched", reasons=list(self.publisher.health().reasons))
                fleet.dismiss("latched")

    def _prepare_standby(self) -> None:
        """The standby loads the tiers after the primary's, or the same one where it is the last."""
        post, first = self.fleet.standby, self.fleet.first_tier
        if post is not None:
            post.setup = replace(post.setup, tiers=(*self._after(first), first))
            self.fleet.plan_standby()

    def _after(self, tier: str) -> tuple[str, ...]:
        return self._tiers[self._tiers.index(tier) + 1 :] if tier in self._tiers else ()

    def _post(self, name: str, setup: Setup) -> Post:
        policy = self.publisher.policy
        return Post(name, setup, Restarts(policy.max_restarts, policy.restart_window_ms, self.config.pauses))

    def _new_monitor(self) -> Monitor:
        monitor = Monitor(self.fleet, self.config, self._tell, self._idle.step, self.log)
        monitor.start()
        return monitor


def _reports(worker: WorkerProcess) -> tuple[TierReport, ...]:
    found = worker.ready or {}
    names = {field.name for field in fields(TierReport)}
    return tuple(TierReport(**{name: report[name] for name in names}) for report in found["reports"])

"""`Publisher`: turns results into frames, and drives the state machine.

Stamps, deadlines and validity are decided here, in the process of whoever acts on the frames: the embedded and the
supervised runtime publish through the same lines. A frame is valid only if nothing speaks against it *and* the state
machine allows valid frames.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from fmdeploy.arrays import Arrays
from fmdeploy.runtime.evidence import SENSOR_REASONS, evidence
from fmdeploy.runtime.explain import health_reasons, objections, warnings
from fmdeploy.runtime.frame import WARNINGS, Finding, Frame, Reason
from fmdeploy.runtime.health import Health
from fmdeploy.runtime.inference import Result
from fmdeploy.runtime.state import Cause, Command, Event, EventKind, Mode, Policy, State, Status, is_calm, step

Clock = Callable[[], int]
NS_PER_MS = 1_000_000
COUNTERS = ("frames", "valid", "missed", "rejected", "dropped", "no_input", "backend_errors", "restarts", "fallbacks")
COUNTER_OF_EVENT = {
    EventKind.FRAME_LATE: "missed", EventKind.FRAME_OVERDUE: "missed", EventKind.FRAME_BAD: "rejected",
    EventKind.BACKEND_FAILED: "backend_errors", EventKind.WORKER_LOST: "restarts", EventKind.TIER_CHANGED: "fallbacks",
}
COUNTER_OF_REASON = {Reason.DROPPED: "dropped", Reason.NO_INPUT: "no_input"}


class Ticket(NamedTuple):
    """One frame between its arrival and its publication.

    Attributes:
        seq: Its number.
        stamp_ns: When the sensors saw it.
        arrived_ns: When it was handed in.
        deadline_ms: Age at which its result is worthless; None: never.
        findings: What its stamp says against it, or that the reduced rate drops it.
        not_taken: The state machine takes no frames now.
    """

    seq: int
    stamp_ns: int
    arrived_ns: int
    deadline_ms: float | None
    findings: tuple[Finding, ...]
    not_taken: bool = False

    @property
    def refused(self) -> bool:
        """Whether the frame must not run."""
        return self.not_taken or bool(self.findings)


class Publisher:
    """One stream of frames, in order, from one runtime. All methods may be called from any thread."""

    def __init__(
        self,
        bundle: str,
        *,
        deadline_ms: float | None = None,
        clock: Clock = time.monotonic_ns,
        policy: Policy | None = None,
    ) -> None:
        """Start a stream for the bundle with this digest, in the state UNCONFIGURED.

        Args:
            bundle: Digest of the bundle.
            deadline_ms: Age at which a result is discarded; None: never.
            clock: Monotonic nanoseconds; sensor stamps are on this clock.
            policy: Thresholds of the state machine.
        """
        self.clock, self.policy = clock, policy or Policy()
        self._bundle, self._deadline_ms = bundle, deadline_ms
        self._lock = threading.Lock()
        self._seq, self._last_stamp, self._completed = 0, -1, -1
        self._started_ns = self._arrived_ns = clock()
        self._status, self._calm = Status(), False
        self._pending: tuple[Command, ...] = ()
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._good: Frame | None = None
        self._phase = 0
        self._identity = "", "", ""

    @property
    def status(self) -> Status:
        """Status of the state machine."""
        return self._status

    @property
    def state(self) -> State:
        """State of the runtime."""
        return self._status.state

    @property
    def mode(self) -> Mode:
        """Degraded mode."""
        return self._status.mode

    @property
    def counters(self) -> dict[str, int]:
        """Totals since the start."""
        with self._lock:
            return dict(self._counters)

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter, which may be a new one; every later frame carries it."""
        with self._lock:
            self._counters[name] = self._counters.get(name, 0) + number

    def runs(self, *, model: str, tier: str, provider: str) -> None:
        """Say what runs now; frames without a result carry it."""
        with self._lock:
            self._identity = model, tier, provider

    def tell(self, kind: EventKind, detail: str = "") -> tuple[Command, ...]:
        """Tell the state machine what happened now, and return what the caller must do."""
        with self._lock:
            return self._step(kind, self.clock(), detail)

    def take_commands(self) -> tuple[Command, ...]:
        """Return what frames have given cause to do since the last call; to be called after `publish` and `poll`."""
        if not self._pending:
            return ()
        with self._lock:
            taken, self._pending = self._pending, ()
            return taken

    def arrive(self, stamp_ns: int | None = None, deadline_ms: float | None = None) -> Ticket:
        """Number a frame and judge its stamp. The structure of its inputs was checked before."""
        with self._lock:
            now = self.clock()
            self._arrived_ns = now
            seq, self._seq = self._seq, self._seq + 1
            deadline = self._deadline_ms if deadline_ms is None else deadline_ms
            stamp = now if stamp_ns is None else stamp_ns
            findings = () if stamp_ns is None else self._judge_stamp(stamp, now, deadline)
            if self._calm:
                return Ticket(seq, stamp, now, deadline, findings)
            if self._status.reduced_rate and not findings:
                findings = self._thin_out()
            return Ticket(seq, stamp, now, deadline, findings, not self._status.takes_frames)

    def publish(self, ticket: Ticket, result: Result) -> Frame:
        """Judge lateness, tell the state machine, and make the frame."""
        seq, stamp, arrived, deadline, problems, _ = ticket
        outputs, found, tier, model, provider, scores = result[:6]
        with self._lock:
            end = self.clock()
            if (self._calm and not problems and not found and outputs
                    and (deadline is None or end - stamp <= deadline * NS_PER_MS)):
                # The short way: where a good frame changes nothing in the state machine, it is not asked.
                counters = self._counters
                counters["frames"] += 1
                counters["valid"] += 1
                self._completed = seq
                for array in outputs.values():
                    array.setflags(write=False)
                frame = Frame(seq, stamp, end, deadline, (end - arrived) / NS_PER_MS, self._bundle, model, tier,
                              provider, "ACTIVE", "", True, (), outputs, scores, counters.copy())
                self._good = frame
                return frame
            return self._judge(ticket, result, end)

    def publish_nothing(self, finding: Finding, stamp_ns: int | None = None) -> Frame:
        """Make a frame for something that has no result: a dropped frame, a lost worker, a silent sensor.

        Args:
            finding: Why.
            stamp_ns: Stamp of the frame that was lost; default: the last stamp that was seen.
        """
        with self._lock:
            return self._nothing(finding, stamp_ns)

    def poll(self) -> Frame | None:
        """Return an invalid frame where nothing arrived within the policy's input timeout."""
        timeout = self.policy.input_timeout_ms
        if timeout is None or self._status.state not in (State.READY, State.ACTIVE, State.DEGRADED):
            return None
        with self._lock:
            now = self.clock()
            silent_ms = (now - self._arrived_ns) / NS_PER_MS
            if silent_ms <= timeout:
                return None
            text = f"nothing arrived for {silent_ms:.1f} ms, at most {timeout:g} ms are allowed"
            self._pending += self._step(EventKind.NO_INPUT, now, text)
            return self._nothing(Finding(Reason.NO_INPUT, text), None)

    def health(self) -> Health:
        """Say how the stream is."""
        with self._lock:
            status, (model, tier, provider) = self._status, self._identity
            return Health(
                live=status.state is not State.FAULT, ready=status.takes_frames, state=status.state.value,
                mode=status.mode.label, tier=tier, provider=provider, reasons=health_reasons(status),
                counters=dict(self._counters), bundle=self._bundle, model=model, last_completed_seq=self._completed,
                uptime_s=(self.clock() - self._started_ns) / 1e9,
            )

    # Below, the lock is held.

    def _step(self, kind: EventKind, now: int, detail: str = "") -> tuple[Command, ...]:
        was_reduced = self._status.reduced_rate
        self._status, commands = step(self._status, Event(kind, now, detail), self.policy)
        if not was_reduced:
            self._phase = 0  # the first frame at the reduced rate runs
        self._calm = is_calm(self._status)
        if kind in COUNTER_OF_EVENT:
            self._counters[COUNTER_OF_EVENT[kind]] += 1
        return commands

    def _judge(self, ticket: Ticket, result: Result, end: int) -> Frame:
        findings, outputs = (*ticket.findings, *result.findings), result.outputs
        if outputs:
            self._completed = ticket.seq
        age_ms = (end - ticket.stamp_ns) / NS_PER_MS
        if ticket.deadline_ms is not None and not age_ms <= ticket.deadline_ms and outputs:
            text = f"{age_ms:.1f} ms old, deadline {ticket.deadline_ms:g} ms"
            findings, outputs = (*findings, Finding(Reason.LATE, text)), {}
        if not ticket.not_taken:
            overdue = ticket.deadline_ms is not None and age_ms > self.policy.hard_factor * ticket.deadline_ms
            for kind, detail in evidence(findings, overdue=overdue, innocent=result.innocent):
                if outputs or kind is not EventKind.FRAME_GOOD:
                    self._pending += self._step(kind, end, detail)
            if outputs and self._has_sensor_cause() and not any(found.code in SENSOR_REASONS for found in findings):
                self._pending += self._step(EventKind.SENSOR_BACK, end)
        for found in ticket.findings:
            self._count_reason(found)
        identity = result.model, result.tier, result.provider
        return self._frame(ticket, findings, outputs, end, identity, result.scores)

    def _nothing(self, finding: Finding, stamp_ns: int | None) -> Frame:
        now = self.clock()
        stamp = stamp_ns if stamp_ns is not None else (self._last_stamp if self._last_stamp >= 0 else self._arrived_ns)
        seq, self._seq = self._seq, self._seq + 1
        self._count_reason(finding)
        ticket = Ticket(seq, stamp, now, self._deadline_ms, (), True)
        return self._frame(ticket, (finding,), {}, now, self._identity, {})

    def _frame(
        self, ticket: Ticket, findings: tuple[Finding, ...], outputs: Arrays, end: int, identity: tuple[str, str, str],
        scores: dict[str, float],
    ) -> Frame:
        """Make a frame of what is known about it and of the state machine's status."""
        own = not ticket.not_taken and all(found.code in WARNINGS for found in findings)
        held = None if own else self._last_good(end)
        status = self._status  # now: looking for the last good result may have told the machine that it is too old
        valid = own and bool(outputs) and status.may_be_valid
        codes = {found.code for found in findings}
        extra = (*objections(status, self.policy), *warnings(status))
        findings += tuple(found for found in extra if found.code not in codes)
        stamp = ticket.stamp_ns
        if not (status.may_be_valid or status.state is State.READY or (own and status.mode is Mode.D3)):
            outputs = {}
        if held is not None:
            stamp, outputs, identity = held.stamp_ns, held.outputs, (held.model, held.tier, held.provider)
        model, tier, provider = identity
        self._counters["frames"] += 1
        self._counters["valid"] += valid
        frame = Frame(ticket.seq, stamp, end, ticket.deadline_ms, (end - ticket.arrived_ns) / NS_PER_MS, self._bundle,
                      model, tier, provider, status.state.value, status.mode.label, valid, findings, outputs, scores,
                      self._counters.copy())
        if valid:
            for array in outputs.values():
                array.setflags(write=False)  # it may be shown again in D3
            self._good = frame
        return frame

    def _last_good(self, now: int) -> Frame | None:
        """The last valid frame, in D3 and within the staleness limit."""
        if self._status.mode is not Mode.D3:
            return None
        good = self._good
        if good is not None and now - good.stamp_ns <= self.policy.hold_ms * NS_PER_MS:
            return good
        self._good = None
        self._pending += self._step(EventKind.HELD_TOO_LONG, now)
        return None

    def _thin_out(self) -> tuple[Finding, ...]:
        runs, self._phase = self._phase == 0, (self._phase + 1) % max(self.policy.reduced_rate, 1)
        if runs:
            return ()
        return (Finding(Reason.DROPPED, f"reduced rate: one of {self.policy.reduced_rate} frames runs"),)

    def _has_sensor_cause(self) -> bool:
        return any(held.cause is Cause.SENSOR and held.lasting for held in self._status.held)

    def _count_reason(self, finding: Finding) -> None:
        if finding.code in COUNTER_OF_REASON:
            self._counters[COUNTER_OF_REASON[finding.code]] += 1

    def _judge_stamp(self, stamp: int, now: int, deadline: float | None) -> tuple[Finding, ...]:
        last = self._last_stamp
        if not stamp > 0:  # also what is no number; zero is a stamp that nobody set
            return (Finding(Reason.BAD_STAMP, f"{stamp} is no time of a sensor"),)
        if stamp > now:
            return (Finding(Reason.BAD_STAMP, f"{(stamp - now) / NS_PER_MS:.1f} ms in the future"),)
        if stamp <= last:
            word = "repeats" if stamp == last else "is older than"
            return (Finding(Reason.BAD_STAMP, f"the stamp {word} the previous one"),)
        self._last_stamp = stamp
        if deadline is not None and not now - stamp <= deadline * NS_PER_MS:  # not: what is no number is never met
            text = f"{(now - stamp) / NS_PER_MS:.1f} ms old on arrival, deadline {deadline:g} ms"
            return (Finding(Reason.STALE, text),)
        return ()

"""`Publisher`: turns results into frames.

Stamps, deadlines and (through the state machine) validity are decided here, in the process of whoever acts on the
frames: the embedded and the supervised runtime publish through the same lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from fmdeploy.runtime.frame import WARNINGS, Finding, Frame, Reason
from fmdeploy.runtime.inference import Result

Clock = Callable[[], int]
NS_PER_MS = 1_000_000


class Ticket(NamedTuple):
    """One frame between its arrival and its publication.

    Attributes:
        seq: Its number.
        stamp_ns: When the sensors saw it.
        arrived_ns: When it was handed in.
        deadline_ms: Age at which its result is worthless; None: never.
        findings: What its stamp says against it.
    """

    seq: int
    stamp_ns: int
    arrived_ns: int
    deadline_ms: float | None
    findings: tuple[Finding, ...]

    @property
    def refused(self) -> bool:
        """Whether the frame must not run."""
        return bool(self.findings)


class Publisher:
    """One stream of frames, in order."""

    def __init__(
        self, bundle: str, *, deadline_ms: float | None = None, clock: Clock = time.monotonic_ns
    ) -> None:
        """Start a stream for the bundle with this digest.

        Args:
            bundle: Digest of the bundle.
            deadline_ms: Age at which a result is discarded; None: never.
            clock: Monotonic nanoseconds; sensor stamps are on this clock.
        """
        self.clock = clock
        self._bundle, self._deadline_ms = bundle, deadline_ms
        self._seq, self._last_stamp = 0, -1

    def arrive(self, stamp_ns: int | None = None, deadline_ms: float | None = None) -> Ticket:
        """Number a frame and judge its stamp. The structure of its inputs was checked before."""
        now = self.clock()
        seq, self._seq = self._seq, self._seq + 1
        deadline = self._deadline_ms if deadline_ms is None else deadline_ms
        stamp = now if stamp_ns is None else stamp_ns
        findings = () if stamp_ns is None else self._judge_stamp(stamp, now, deadline)
        return Ticket(seq, stamp, now, deadline, findings)

    def publish(self, ticket: Ticket, result: Result) -> Frame:
        """Judge lateness, and make the frame."""
        end = self.clock()
        findings, outputs = (*ticket.findings, *result.findings), result.outputs
        if ticket.deadline_ms is not None and end - ticket.stamp_ns > ticket.deadline_ms * NS_PER_MS and outputs:
            text = f"{(end - ticket.stamp_ns) / NS_PER_MS:.1f} ms old, deadline {ticket.deadline_ms:g} ms"
            findings, outputs = (*findings, Finding(Reason.LATE, text)), {}
        valid = not findings or all(finding.code in WARNINGS for finding in findings)
        return Frame(ticket.seq, ticket.stamp_ns, end, ticket.deadline_ms, (end - ticket.arrived_ns) / NS_PER_MS,
                     self._bundle, result.model, result.tier, result.provider, "ACTIVE", "", valid, findings, outputs,
                     result.scores)

    def _judge_stamp(self, stamp: int, now: int, deadline: float | None) -> tuple[Finding, ...]:
        last = self._last_stamp
        if stamp > now:
            return (Finding(Reason.BAD_STAMP, f"{(stamp - now) / NS_PER_MS:.1f} ms in the future"),)
        if stamp <= last:
            word = "repeats" if stamp == last else "is older than"
            return (Finding(Reason.BAD_STAMP, f"the stamp {word} the previous one"),)
        self._last_stamp = stamp
        if deadline is not None and now - stamp > deadline * NS_PER_MS:
            text = f"{(now - stamp) / NS_PER_MS:.1f} ms old on arrival, deadline {deadline:g} ms"
            return (Finding(Reason.STALE, text),)
        return ()

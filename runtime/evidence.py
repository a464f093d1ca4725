"""What a frame's findings tell the state machine."""

from __future__ import annotations

from collections.abc import Sequence

from fmdeploy.runtime.frame import WARNINGS, Finding, Reason
from fmdeploy.runtime.state import EventKind

# Frames that did not run say nothing about the model or the sensors; who dropped them has told the machine why.
NO_EVIDENCE = frozenset({Reason.DROPPED, Reason.NOT_READY, Reason.LATCHED, Reason.WORKER_LOST, Reason.UNMONITORED})
SENSOR_REASONS = frozenset({Reason.SENSOR_MODE, Reason.SENSOR_MISSING})


def evidence(findings: Sequence[Finding], *, overdue: bool, innocent: bool) -> list[tuple[EventKind, str]]:
    """What a frame's findings say to the state machine: at most one event about sensors and one about the frame.

    Args:
        findings: Of the stamp, the guards, the backend and the deadline.
        overdue: The result is past the hard deadline.
        innocent: The backend raised, but not on the golden input: the frame is to blame.
    """
    by_code = {found.code: found.detail for found in reversed(findings)}
    told = [(EventKind.SENSOR_LOST, by_code[code]) for code in sorted(SENSOR_REASONS & by_code.keys())[:1]]
    if Reason.DEVICE_LOST in by_code and Reason.WORKER_LOST not in by_code:  # a supervisor has told of its loss itself
        return [*told, (EventKind.DEVICE_LOST, by_code[Reason.DEVICE_LOST])]
    if Reason.BACKEND_ERROR in by_code and not innocent:
        return [*told, (EventKind.BACKEND_FAILED, by_code[Reason.BACKEND_ERROR])]
    if not by_code.keys().isdisjoint(NO_EVIDENCE):
        return told
    if by_code.keys() <= WARNINGS:
        return [*told, (EventKind.FRAME_GOOD, "")]
    if by_code.keys() - WARNINGS == {Reason.LATE}:
        return [*told, (EventKind.FRAME_OVERDUE if overdue else EventKind.FRAME_LATE, by_code[Reason.LATE])]
    return [*told, (EventKind.FRAME_BAD, next(found.detail for found in findings if found.code not in WARNINGS))]

"""What the runtime publishes: a result, or the absence of one, with everything needed to judge it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from fmdeploy.arrays import Arrays
from fmdeploy.errors import FrameError


class Reason(str, Enum):
    """Why a frame is not valid, or is worth a look."""

    __hash__ = str.__hash__  # many times faster than that of an Enum, and frames are made in the hot path

    # What the guards see in the inputs
    NOT_FINITE = "NOT_FINITE"  # NaN or infinity in an input; INT8 would turn it into plausible numbers
    OUT_OF_RANGE = "OUT_OF_RANGE"  # outside the specification's value range
    LOW_INFORMATION = "LOW_INFORMATION"  # constant, black, white or single-coloured input
    FROZEN = "FROZEN"  # the same content again and again, with moving stamps
    TORN = "TORN"  # half of one frame and half of the one before it
    UNUSUAL_INPUT = "UNUSUAL_INPUT"  # far from the calibration set's statistics; a warning
    OUT_OF_DISTRIBUTION = "OUT_OF_DISTRIBUTION"  # so far from them that the model was never shown anything like it
    SENSOR_MISSING = "SENSOR_MISSING"  # a sensor is not there, and the bundle declares no mode without it
    SENSOR_MODE = "SENSOR_MODE"  # a sensor is not there, as the bundle declares and measured it; a warning
    # What the stamps and the stream say
    NO_INPUT = "NO_INPUT"  # no frame came within the input timeout
    STALE = "STALE"  # older than its deadline on arrival
    BAD_STAMP = "BAD_STAMP"  # from the future, repeated or out of order
    DROPPED = "DROPPED"  # the queue was full and a newer frame took its place
    # What the model did
    LATE = "LATE"  # the result came after its deadline
    BACKEND_ERROR = "BACKEND_ERROR"  # the backend raised
    DEVICE_LOST = "DEVICE_LOST"  # the device fails every call: only a new process can help
    NOT_FINITE_OUTPUT = "NOT_FINITE_OUTPUT"  # NaN or infinity in an output
    UNUSUAL_OUTPUT = "UNUSUAL_OUTPUT"  # an output far from what the calibration set gave; a warning
    # What the process and the machine do
    NOT_READY = "NOT_READY"  # loading, in self-test, on probation after bad frames, or draining
    WORKER_LOST = "WORKER_LOST"  # the worker process died, or was killed at its hard deadline
    UNMONITORED = "UNMONITORED"  # the monitor itself is lost: nothing is valid without it
    LATCHED = "LATCHED"  # too many restarts: only the operator brings it back
    FALLBACK = "FALLBACK"  # a cheaper tier took over; a warning
    MEMORY_FLOOR = "MEMORY_FLOOR"  # little memory is left on the machine; a warning
    THROTTLED = "THROTTLED"  # the board throttles for heat or current; a warning
    MODEL_CHANGED = "MODEL_CHANGED"  # the bundle on disk is no longer what was loaded and still runs; a warning


WARNINGS = frozenset({
    Reason.UNUSUAL_INPUT, Reason.UNUSUAL_OUTPUT, Reason.SENSOR_MODE, Reason.FALLBACK,
    Reason.MEMORY_FLOOR, Reason.THROTTLED, Reason.MODEL_CHANGED,
})


class Finding(NamedTuple):
    """A reason code with its one-line explanation."""

    code: Reason
    detail: str


@dataclass(slots=True)
class Frame:
    """One published result. Only a frame with `valid` may be acted on.

    Attributes:
        seq: Number of the frame since the runtime started.
        stamp_ns: When the sensors saw it, on the runtime's monotonic clock.
        published_ns: When this result was finished, same clock.
        deadline_ms: Age at which the result is worthless; None: never.
        latency_ms: From the call of `infer` to the result.
        bundle: Digest of the bundle.
        model: sha256 of the model file that ran.
        tier: Variant that ran, such as `int8-cpu`.
        provider: Execution provider that ran it.
        state: State of the runtime when this was published, such as `ACTIVE` or `DEGRADED`.
        mode: Degraded mode, `D1` to `D4`; empty where nothing is degraded.
        valid: Whether the outputs may be used as fresh perception.
        findings: Why not, and warnings.
        outputs: Output name to float32 array without batch axis; empty where nothing was computed or it came too late.
        scores: Named numbers of the guards, such as `lidar.distance`: how unusual the input was, in calibration sigmas.
        counters: Totals since the start, such as `missed` and `restarts`.
    """

    seq: int
    stamp_ns: int
    published_ns: int
    deadline_ms: float | None
    latency_ms: float
    bundle: str
    model: str
    tier: str
    provider: str
    state: str
    mode: str
    valid: bool
    findings: tuple[Finding, ...]
    outputs: Arrays
    scores: Mapping[str, float] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)

    @property
    def age_ms(self) -> float:
        """Age of the sensor data when the result was published."""
        return (self.published_ns - self.stamp_ns) / 1e6

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """The codes of all findings."""
        return tuple(finding.code for finding in self.findings)

    def require_valid(self) -> Frame:
        """Return this frame.

        Raises:
            FrameError: It is not valid; the text holds every finding.
        """
        if not self.valid:
            text = "; ".join(f"{finding.code.value} {finding.detail}" for finding in self.findings)
            raise FrameError(text, where=f"frame {self.seq}")
        return self

    def record(self) -> dict[str, Any]:
        """Return everything but the outputs, as plain JSON."""
        return {
            "seq": self.seq,
            "stamp_ns": self.stamp_ns,
            "published_ns": self.published_ns,
            "age_ms": round(self.age_ms, 6),
            "deadline_ms": self.deadline_ms,
            "latency_ms": round(self.latency_ms, 6),
            "bundle": self.bundle,
            "model": self.model,
            "tier": self.tier,
            "provider": self.provider,
            "state": self.state,
            "mode": self.mode,
            "valid": self.valid,
            "reasons": [finding.code.value for finding in self.findings],
            "details": [finding.detail for finding in self.findings],
            "scores": {name: round(value, 6) for name, value in self.scores.items()},
            "counters": dict(self.counters),
        }

"""What the runtime publishes: a result, or the absence of one, with everything needed to judge it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from fmdeploy.arrays import Arrays
from fmdeploy.errors import FrameError


class Reason(str, Enum):
    """Why a frame is not valid, or is worth a look."""

    NOT_FINITE = "NOT_FINITE"  # NaN or infinity in an input; INT8 would turn it into plausible numbers
    OUT_OF_RANGE = "OUT_OF_RANGE"  # outside the specification's value range
    LOW_INFORMATION = "LOW_INFORMATION"  # constant, black, white or single-coloured input
    FROZEN = "FROZEN"  # the same content again and again, with moving stamps
    UNUSUAL_INPUT = "UNUSUAL_INPUT"  # far from the calibration set's statistics; a warning
    STALE = "STALE"  # older than its deadline on arrival
    BAD_STAMP = "BAD_STAMP"  # from the future, repeated or out of order
    LATE = "LATE"  # the result came after its deadline
    BACKEND_ERROR = "BACKEND_ERROR"  # the backend raised
    NOT_FINITE_OUTPUT = "NOT_FINITE_OUTPUT"  # NaN or infinity in an output


WARNINGS = frozenset({Reason.UNUSUAL_INPUT})


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
        valid: Whether the outputs may be used as fresh perception.
        findings: Why not, and warnings.
        outputs: Output name to float32 array without batch axis; empty where nothing was computed or it came too late.
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
    valid: bool
    findings: tuple[Finding, ...]
    outputs: Arrays

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
            "valid": self.valid,
            "reasons": [finding.code.value for finding in self.findings],
            "details": [finding.detail for finding in self.findings],
        }

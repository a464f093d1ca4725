"""Why a plan (a serialised TensorRT engine) is not used: one code a cause, told apart before it runs.

TensorRT has no question "does this plan fit here": it returns nothing and complains. The texts below are those of
TensorRT 8.5 to 11 and of TensorRT-RTX 1.7; a complaint that none of them knows keeps the general code.
"""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

from fmdeploy.errors import ModelFileError

# Magic tag (4 bytes), a size (8) and the version (1 byte each for major, minor, patch, build at offset 24) come first:
# nothing shorter is a plan, and who reads the version of a shorter one reads past its end.
HEADER_BYTES = 28


class PlanFault(str, Enum):
    """What is wrong with a plan. Those that begin with PLAN_INCOMPATIBLE are whole, and belong elsewhere."""

    MISSING = "PLAN_MISSING"  # there is none for this model
    EMPTY = "PLAN_EMPTY"
    TOO_SHORT = "PLAN_TOO_SHORT"  # shorter than a plan's header
    NOT_A_PLAN = "PLAN_NOT_A_PLAN"  # the magic tag is another
    TRUNCATED = "PLAN_TRUNCATED"  # its tail is missing
    ALTERED = "PLAN_ALTERED"  # other bytes than those that were sealed
    HOST_CODE = "PLAN_HOST_CODE"  # version-compatible: brings code for the host, which is never run
    INCOMPATIBLE = "PLAN_INCOMPATIBLE"  # TensorRT refuses it; its log is in the text
    OTHER_MODEL = "PLAN_INCOMPATIBLE_MODEL"
    OTHER_TENSORRT = "PLAN_INCOMPATIBLE_TENSORRT"
    OTHER_GPU = "PLAN_INCOMPATIBLE_GPU"
    OTHER_L4T = "PLAN_INCOMPATIBLE_L4T"


class PlanError(ModelFileError):
    """A plan that is not used, with its code in the text and in `code`.

    Attributes:
        code: The cause.
        root: The artifact, where it was made for this very model and machine: it is in the way of a new one.
    """

    def __init__(
        self, code: PlanFault, what: str, *, where: object = None, expected: object = None, found: object = None
    ) -> None:
        super().__init__(f"{code.value}: {what}", where=where, expected=expected, found=found,
                         fix="Build it on this machine with fmdeploy build")
        self.code = code
        self.root: Path | None = None


COMPLAINTS = (  # the first that fits decides: the complaint about a foreign magic tag mentions versions, too
    (re.compile(r"empty memory buffer"), PlanFault.EMPTY),
    (re.compile(r"bufferSize >= minBufferSize"), PlanFault.TOO_SHORT),
    (re.compile(r"magic ?tag", re.IGNORECASE), PlanFault.NOT_A_PLAN),
    (re.compile(r"header\.size == blobSize|unexpected end|read past|remaining (size|bytes)"), PlanFault.TRUNCATED),
    (re.compile(r"HostCodeAllowed|host code|lean runtime", re.IGNORECASE), PlanFault.HOST_CODE),
    (re.compile(r"Version tag does not match|SERIALIZATION_VERSION|serializationVersion"), PlanFault.OTHER_TENSORRT),
    (re.compile(r"incompatible device|compute capability|expecting compute|device is not compatible"),
     PlanFault.OTHER_GPU),
    (re.compile(r"platform.{0,40}(mismatch|different|does not match)|built for .{0,20}platform", re.IGNORECASE),
     PlanFault.OTHER_L4T),
)


def fault_of(complaint: str) -> PlanFault:
    """The cause that a complaint of TensorRT names."""
    return next((fault for pattern, fault in COMPLAINTS if pattern.search(complaint)), PlanFault.INCOMPATIBLE)


def check_length(plan: bytes, where: object = None) -> None:
    """Refuse what cannot be a plan, before TensorRT reads it.

    Raises:
        PlanError: it is empty, or shorter than a plan's header.
    """
    if not plan:
        raise PlanError(PlanFault.EMPTY, "the plan holds no bytes", where=where)
    if len(plan) < HEADER_BYTES:
        raise PlanError(PlanFault.TOO_SHORT, "is shorter than the header of a plan", where=where,
                        expected=f"at least {HEADER_BYTES} bytes", found=len(plan))

"""What a runtime says of itself, and what every runtime can do: the embedded and the supervised one alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from fmdeploy.arrays import Arrays
from fmdeploy.errors import FmdeployError
from fmdeploy.runtime.bundle import Bundle
from fmdeploy.runtime.frame import Frame
from fmdeploy.runtime.state import EventKind
from fmdeploy.runtime.tiers import TierReport

# What others may tell a runtime. All else it finds out itself: a self-test that was only claimed would be no proof.
AROUND = frozenset({EventKind.THROTTLED, EventKind.COOL, EventKind.MEMORY_LOW, EventKind.MEMORY_OK})


@dataclass(frozen=True)
class Health:
    """A runtime at one moment.

    Attributes:
        live: Whether the process can be trusted; False: end it, with a non-zero exit code.
        ready: Whether frames are run. Also True in modes that publish nothing valid, where good frames are the proof
            that ends them.
        state: State, such as `ACTIVE`.
        mode: Degraded mode, `D1` to `D4`; empty where nothing is degraded.
        tier: Tier that runs.
        provider: What really runs it.
        reasons: What speaks against full service, worst first: a reason code, a colon, words.
        counters: Totals since the start.
        bundle: Digest of the bundle.
        model: sha256 of the model file that runs.
        last_completed_seq: Number of the last frame that the model finished; -1: none yet. A stuck loop shows here.
        uptime_s: Seconds since the start.
    """

    live: bool
    ready: bool
    state: str
    mode: str
    tier: str
    provider: str
    reasons: tuple[str, ...]
    counters: Mapping[str, int]
    bundle: str
    model: str
    last_completed_seq: int
    uptime_s: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {**self.__dict__, "reasons": list(self.reasons), "counters": dict(self.counters),
                "uptime_s": round(self.uptime_s, 3)}


class PerceptionRuntime(Protocol):
    """What takes frames: `Runtime` in this process, `SupervisedRuntime` with a worker process."""

    @property
    def bundle(self) -> Bundle:
        """What it runs."""

    @property
    def tier(self) -> str:
        """The tier that serves now."""

    @property
    def reports(self) -> tuple[TierReport, ...]:
        """What was found about every tier, in the order they were asked for."""

    def infer(
        self,
        inputs: Arrays,
        *,
        stamp_ns: int | None = None,
        deadline_ms: float | None = None,
        layouts: Mapping[str, str] | None = None,
        missing: Collection[str] = (),
    ) -> Frame:
        """Judge one frame, run it, and judge the result."""

    def poll(self) -> Frame | None:
        """Return an invalid frame where none arrived within the input timeout; to be called once a frame period."""

    def health(self) -> Health:
        """Say how it is."""

    def note(self, kind: EventKind, detail: str = "") -> None:
        """Say what was seen of the machine around it: one of `AROUND`. From any thread, also while a frame runs."""

    def reset(self) -> None:
        """The operator unlatches SAFE_OUTPUT: load, self-test, and serve again if it passes."""

    def close(self) -> object:
        """Drain and stop. A second call does nothing."""

    def __enter__(self) -> PerceptionRuntime:
        """Return itself."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""


def require_around(kind: EventKind) -> None:
    """Check that an event is one that others may tell.

    Raises:
        FmdeployError: It is not.
    """
    if kind not in AROUND:
        raise FmdeployError("is nothing that others may tell a runtime", where=kind.value,
                            expected=", ".join(sorted(one.value for one in AROUND)))


def forked() -> FmdeployError:
    """The error of every call in a forked child (F37): threads and locks of the parent are not there."""
    return FmdeployError("the runtime was forked; start it in the process that uses it")

"""All settings of the supervision of a worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fmdeploy.runtime.supervisor.process import COMMAND
from fmdeploy.runtime.supervisor.restarts import Pauses
from fmdeploy.runtime.supervisor.watch import MemoryPolicy


@dataclass(frozen=True)
class Supervision:
    """How a worker is watched.

    Attributes:
        hard_deadline_ms: Time after the arrival of a frame at which its caller has an answer, whatever happens: the
            worker is killed. Choose 3 to 5 frame periods, and more than twice the longest run: a frame that waits half
            of it for others is dropped.
        terminate_ms: Time after which the worker asks its backend to end a run; less than the hard deadline, or 0.
        start_timeout_ms: Time for a worker to load and pass its self-test.
        beat_ms: Longest time between two heartbeats of an idle worker.
        silent_ms: An idle worker without a heartbeat for so long is killed.
        monitor_ms: Period of the monitor.
        unmonitored_ms: Frames are invalid when the monitor has not come round for so long.
        idle_self_test_ms: Without frames for so long the golden inputs run; 0: never.
        pauses: Pauses before restarts.
        memory: Limits on memory.
        address_space_mib: Limit on a worker's address space, so that a leak becomes an error of one frame; 0: none. Not
            for CUDA, which reserves far more than it uses.
        events: File that gets one JSON line an event; None: none. A full disk loses lines, not frames.
        command: How to start a worker.
    """

    hard_deadline_ms: float = 1000.0
    terminate_ms: float = 600.0
    start_timeout_ms: float = 120_000.0
    beat_ms: float = 100.0
    silent_ms: float = 1000.0
    monitor_ms: float = 50.0
    unmonitored_ms: float = 1000.0
    idle_self_test_ms: float = 60_000.0
    pauses: Pauses = field(default_factory=Pauses)
    memory: MemoryPolicy = field(default_factory=MemoryPolicy)
    address_space_mib: int = 0
    events: Path | None = None
    command: Sequence[str] = COMMAND

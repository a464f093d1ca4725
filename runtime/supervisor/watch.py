"""Memory, from /proc: how much the machine has left, and how much a worker grew.

On a Jetson CPU and GPU share one memory and GPU allocations are in no process's RSS, so the floor on MemAvailable is
the one number that sees all of it. Below it no standby is started; a worker that grows is replaced between two frames,
before the kernel's OOM killer chooses somebody itself.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

from fmdeploy.jetson.machine import available_mib

MIB = 1 << 20
# The floor counts as left behind only this much above it: no flapping around one value.
HYSTERESIS = 1.25


@dataclass(frozen=True)
class MemoryPolicy:
    """Limits on memory.

    Attributes:
        floor_mib: MemAvailable below which nothing new is started and frames carry MEMORY_FLOOR; 0 switches it off.
        growth_mib: Growth of a worker's RSS over its baseline after which it is replaced; 0 switches it off.
        warm_up_runs: Completed runs after which the baseline is taken: the first ones fill caches and the arena.
        root: Folder whose proc/ is read; another than / in tests.
    """

    floor_mib: float = 256.0
    growth_mib: float = 512.0
    warm_up_runs: int = 100
    root: Path = Path("/")


class Floor:
    """Whether the machine is short of memory."""

    def __init__(self, policy: MemoryPolicy) -> None:
        self.policy, self.low = policy, False
        self.available_mib: int | None = None

    def look(self) -> bool:
        """Read MemAvailable and say whether it is low. Unknown is not low, and never replaced by a number."""
        self.available_mib = available_mib(self.policy.root)
        if self.available_mib is not None:
            limit = self.policy.floor_mib * (HYSTERESIS if self.low else 1.0)
            self.low = self.available_mib < limit
        return self.low


class Growth:
    """Whether one worker grows."""

    def __init__(self, policy: MemoryPolicy, pid: int) -> None:
        self.policy, self.pid = policy, pid
        self.baseline_mib: float | None = None
        self.rss_mib: float | None = None

    def look(self, completed: int) -> bool:
        """Read the worker's RSS after it completed so many runs; return whether it should be replaced."""
        self.rss_mib = rss_mib(self.pid, self.policy.root)
        if self.rss_mib is None or not self.policy.growth_mib:
            return False
        if self.baseline_mib is None:
            if completed >= self.policy.warm_up_runs:
                self.baseline_mib = self.rss_mib
            return False
        return self.rss_mib - self.baseline_mib > self.policy.growth_mib


def rss_mib(pid: int, root: Path = Path("/")) -> float | None:
    """Resident set of a process, in MiB; None when it is gone."""
    try:
        pages = (root / f"proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return None
    return int(pages) * resource.getpagesize() / MIB

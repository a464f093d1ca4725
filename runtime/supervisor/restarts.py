"""When a lost worker may come back: at once, then with growing pauses, and after too many losses not at all.

A worker that dies again and again is not bad luck. After too many losses within the window the state machine latches,
and only an operator opens the latch: flapping for ever would look like perception every few seconds. The same numbers
retire a standby worker that cannot live.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

NS_PER_MS = 1_000_000


@dataclass(frozen=True)
class Pauses:
    """How fast workers come back.

    Attributes:
        first_ms: Pause before the first restart within the window.
        next_ms: Pause before the second; it doubles with every further one.
        longest_ms: The pause grows no further.
    """

    first_ms: float = 0.0
    next_ms: float = 100.0
    longest_ms: float = 5000.0


class Restarts:
    """The losses of the last while."""

    def __init__(self, budget: int, window_ms: float, pauses: Pauses) -> None:
        """Allow `budget` losses within the window."""
        self.budget, self.window_ns, self.pauses = budget, int(window_ms * NS_PER_MS), pauses
        self._lost_ns: deque[int] = deque()

    @property
    def exhausted(self) -> bool:
        """Whether there were too many losses, at the time of the last one."""
        return len(self._lost_ns) > self.budget

    def lost(self, now_ns: int) -> None:
        """Count a loss."""
        self._lost_ns.append(now_ns)
        while self._lost_ns[0] < now_ns - self.window_ns:
            self._lost_ns.popleft()

    def next_start_ns(self, now_ns: int) -> int:
        """When the next worker may be started."""
        recent, pauses = len(self._lost_ns), self.pauses
        if recent == 0:
            return now_ns
        pause_ms = pauses.first_ms if recent == 1 else pauses.next_ms * 2.0 ** min(recent - 2, 32)
        return now_ns + int(min(pause_ms, pauses.longest_ms) * NS_PER_MS)

    def forget(self) -> None:
        """Start anew: the operator said so."""
        self._lost_ns.clear()

"""A clock that a test moves."""

from __future__ import annotations


class Clock:
    """Nanoseconds that only move when told."""

    def __init__(self) -> None:
        self.now = 10**12

    def __call__(self) -> int:
        return self.now

    def pass_ms(self, ms: float) -> None:
        """Let time pass."""
        self.now += int(ms * 1e6)

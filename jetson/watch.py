"""Does the board throttle? Told to a state machine as events: at once when it begins, slowly when it is over.

    watch = Watch()
    for kind, detail in watch.events():    # never waits; call it about ten times a second
        publisher.tell(EventKind(kind), detail)
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from fmdeploy.jetson.overcurrent import meaning
from fmdeploy.jetson.telemetry import Telemetry

THROTTLED, COOL = "THROTTLED", "COOL"
COOL_AFTER_S = 5.0
HYSTERESIS_C = 3.0
RESTART_S = 5.0


class Event(NamedTuple):
    """What changed: `THROTTLED` or `COOL`, and why."""

    kind: str
    detail: str


class Judge:
    """Hysteresis over snapshots. What is unknown changes nothing: silence is no proof that the board is cool."""

    def __init__(self, *, cool_after_s: float = COOL_AFTER_S, hysteresis_c: float = HYSTERESIS_C) -> None:
        """`cool_after_s` without a sign, and every zone `hysteresis_c` below its limit, are cool."""
        self.cool_after_ns, self.hysteresis_c = int(cool_after_s * 1e9), hysteresis_c
        self.throttled = False
        self._counts: dict[str, int] = {}
        self._last_sign_ns = 0

    def take(self, now: Mapping[str, Any]) -> list[Event]:
        """Judge one snapshot, as plain JSON."""
        signs = self._signs(now)
        if signs:
            self._last_sign_ns = now["at_ns"]
            if not self.throttled:
                self.throttled = True
                return [Event(THROTTLED, "; ".join(signs))]
        elif self.throttled and self._cool(now):
            self.throttled = False
            return [Event(COOL, f"no sign of throttling for {self.cool_after_ns / 1e9:g} s")]
        return []

    def _signs(self, now: Mapping[str, Any]) -> list[str]:
        moved = {name: count - self._counts[name] for name, count in now["events"].items()
                 if count != self._counts.get(name, count)}
        self._counts = {**self._counts, **now["events"]}
        return [
            *(f"{name} is at {celsius:.1f} °C, its limit is {limit:.1f} °C"
              for name, (celsius, limit) in now["hot"].items()),
            *(f"{meaning(name)}: {count} events" for name, count in moved.items()),
            *(f"cooling by {name}, state {state}" for name, state in now["slowing"].items() if state > 0),
        ]

    def _cool(self, now: Mapping[str, Any]) -> bool:
        quiet, margin = now["at_ns"] - self._last_sign_ns >= self.cool_after_ns, now["margin_c"]
        return quiet and (margin is None or margin >= self.hysteresis_c)


class Watch:
    """Telemetry and a judge. The process is started anew when it is lost."""

    def __init__(self, root: Path = Path("/"), *, rate_hz: float = 10.0, cool_after_s: float = COOL_AFTER_S) -> None:
        """Start watching the machine below `root`."""
        self._root, self._rate_hz = root, rate_hz
        self._telemetry, self._started_at = Telemetry(root, rate_hz=rate_hz), time.monotonic()
        self._judge, self._seen_ns = Judge(cool_after_s=cool_after_s), 0

    @property
    def throttled(self) -> bool:
        """Whether the board throttles, as far as is known."""
        return self._judge.throttled

    def latest(self) -> dict[str, Any] | None:
        """Return the newest snapshot as plain JSON, without waiting; None: UNKNOWN."""
        return self._telemetry.latest()

    def events(self) -> list[Event]:
        """Return what changed since the last call, without waiting."""
        now = self._telemetry.latest()
        if now is None:
            self._restart_if_lost()
            return []
        if now["at_ns"] == self._seen_ns:
            return []
        self._seen_ns = now["at_ns"]
        return self._judge.take(now)

    def _restart_if_lost(self) -> None:
        if self._telemetry.alive or time.monotonic() - self._started_at < RESTART_S:
            return
        self._telemetry.close()
        self._telemetry, self._started_at = Telemetry(self._root, rate_hz=self._rate_hz), time.monotonic()

    def close(self) -> None:
        """End the telemetry process."""
        self._telemetry.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

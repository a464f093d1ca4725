"""Section on the guards: how often each of them spoke on the evaluation's frames, which are clean."""

from __future__ import annotations

from dataclasses import dataclass

from fmdeploy.artifact import Artifact
from fmdeploy.evaluate.report.sources import Sources

FILE = "check.json"
# What the guards can say about a single sample. FROZEN and TORN speak of a stream, and samples are none.
GUARDS = ("NOT_FINITE", "OUT_OF_RANGE", "LOW_INFORMATION", "UNUSUAL_INPUT", "NOT_FINITE_OUTPUT", "UNUSUAL_OUTPUT")


@dataclass(frozen=True)
class AlarmRow:
    """One guard in one tier: its alarms among the frames of an evaluation."""

    tier: str
    guard: str
    alarms: int
    frames: int

    @property
    def share(self) -> float:
        """False alarms a frame."""
        return self.alarms / self.frames


def alarm_rows(sources: Sources) -> list[AlarmRow]:
    """Every guard of every tier that was evaluated, silent ones included."""
    return [row for check in sources.checks if check.has(FILE) for row in _rows_of(check)]


def _rows_of(check: Artifact) -> list[AlarmRow]:
    frames = check.json("metrics.json").get("samples") if check.has("metrics.json") else None
    rows = []
    for tier, found in check.json(FILE).get("tiers", {}).items():
        if not isinstance(frames, int) or frames < 1 or not found.get("admitted"):
            continue
        flags = found.get("flags", {})
        names = [*GUARDS, *sorted(flags.keys() - set(GUARDS))]
        rows += [AlarmRow(tier, name, int(flags.get(name, 0)), frames) for name in names]
    return rows

"""What tiers cost here: times, memory, and the conditions that both were measured under."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fmdeploy.runtime.measure.conditions import Conditions
from fmdeploy.runtime.measure.latency import speedup, summary
from fmdeploy.runtime.measure.memory import PeakMemory


@dataclass(frozen=True)
class Measured:
    """What tiers cost, and under which conditions."""

    times: dict[str, list[float]]
    conditions: Conditions
    peaks: dict[str, PeakMemory]

    def to_json(self, threads: int) -> dict[str, Any]:
        """Return plain JSON, without the times of single runs."""
        times = self.times
        return {
            "latency": {name: {**summary(ms), "threads": threads} for name, ms in times.items()},
            "speedup": {name: speedup(times["fp32"], ms).__dict__ for name, ms in times.items()
                        if name != "fp32" and "fp32" in times},
            "peak_mib": {name: peak.peak_mib for name, peak in self.peaks.items()},
            "memory": {name: peak.to_json() for name, peak in self.peaks.items()},
            "conditions": self.conditions.to_json(),
        }

    def lines(self) -> list[str]:
        """Return one line a tier, and the conditions."""
        return [*latency_lines(self.times), *self.conditions.lines()]


def latency_lines(times: Mapping[str, Sequence[float]]) -> list[str]:
    """Return one line a tier; a percentile that the number of runs cannot support is a dash."""
    lines = []
    for name, ms in times.items():
        found = summary(ms)
        cells = ", ".join(f"{key} {'-' if found[f'{key}_ms'] is None else format(found[f'{key}_ms'], '.3f')}"
                          for key in ("p50", "p95", "p99", "max"))
        lines.append(f"{name} latency: {cells} ms, n {found['n']}")
    return lines

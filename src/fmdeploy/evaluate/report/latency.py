"""Section on latency: what the checks measured on their machine."""

# R timed runs

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fmdeploy.evaluate.plots.figure import Picture
from fmdeploy.evaluate.plots.latency import plot_latency
from fmdeploy.evaluate.report.sources import Sources

FILE = "latency.json"


@dataclass(frozen=True)
class Tier:
    """Timed runs of one tier (R,), in milliseconds."""

    name: str
    look: str
    times_ms: npt.NDArray[np.float64]
    threads: int | None

    def quantile_ms(self, share: float) -> float:
        """A quantile of the runs."""
        return float(np.quantile(self.times_ms, share))


def tiers_of(sources: Sources) -> list[Tier]:
    """All tiers that the checks timed."""
    return [tier for check in sources.checks if check.has(FILE) for tier in _tiers(check.json(FILE))]


def _tiers(raw: dict[str, dict[str, object]]) -> Iterator[Tier]:
    for name, timed in raw.items():
        times = np.asarray(timed.get("ms", ()), np.float64)
        threads = timed.get("threads")
        if len(times):
            look = "int8" if "int8" in name else "student"
            yield Tier(name, look, times, threads if isinstance(threads, int) else None)


def latency_section(sources: Sources) -> tuple[Picture | str, list[Tier]]:
    """The histogram, or why there is none, and the tiers for the table."""
    if not sources.checks:
        return "no CHECK, so nothing was timed", []
    tiers = tiers_of(sources)
    if not tiers:
        return "the CHECK holds no timed runs", []
    return plot_latency({t.name: t.times_ms for t in tiers}, {t.name: t.look for t in tiers}), tiers

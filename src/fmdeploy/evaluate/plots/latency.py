"""Latency histograms: the shape of the tail is the point, so the axis is logarithmic and nothing is cut off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fmdeploy.evaluate.plots.figure import LOOKS, MUTED, Picture, canvas, to_svg

NUM_BINS = 60
HEADROOM = 1.3  # for the labels above the bars


def plot_latency(tiers: Mapping[str, npt.NDArray[np.float64]], looks: Mapping[str, str]) -> Picture:
    """One row a tier: histogram of milliseconds (R,), with p50 and p99 marked.

    Args:
        tiers: Tier → milliseconds of every timed run.
        looks: Tier → key of `figure.LOOKS`.
    """
    everything = np.concatenate(list(tiers.values()))
    low, high = float(everything.min()) * 0.9, float(everything.max()) * 1.1
    edges = np.geomspace(max(low, 1e-4), max(high, 2e-4), NUM_BINS)
    rows = {"nrows": len(tiers), "sharex": True, "squeeze": False}
    with canvas("latency", 7.6, 0.7 + 1.15 * len(tiers), **rows) as (figure, axes):
        for panel, (tier, times_ms) in zip(axes.flat, tiers.items(), strict=True):
            _draw(panel, tier, times_ms, edges, LOOKS[looks[tier]].color)
        last = axes.flat[-1]
        last.set_xlabel("milliseconds a frame (log scale)")
        ticks = [t for d in range(-4, 6) for t in (10.0**d, 2 * 10.0**d, 5 * 10.0**d) if low <= t <= high]
        last.set_xticks(ticks, [f"{t:g}" for t in ticks])
        last.minorticks_off()
        svg = to_svg(figure, "latency")
    said = [f"{tier}: p50 {np.median(v):.3g} ms, p99 {np.quantile(v, 0.99):.3g} ms" for tier, v in tiers.items()]
    return Picture(svg, f"Histogram of latency. {'; '.join(said)}.")


def _draw(panel: Any, tier: str, times_ms: npt.NDArray[np.float64], edges: Any, color: str) -> None:
    panel.set_xscale("log")
    panel.hist(times_ms, bins=edges, color=color, alpha=0.8)
    panel.set_title(f"{tier}  ({len(times_ms)} runs)")
    panel.set_yticks([])
    panel.spines["left"].set_visible(False)
    top = panel.get_ylim()[1] * HEADROOM
    panel.set_ylim(0, top)
    for quantile, label, side in ((0.5, "p50", "right"), (0.99, "p99", "left")):
        place = float(np.quantile(times_ms, quantile))
        panel.axvline(place, color=MUTED, linewidth=1.0, linestyle="--")
        panel.annotate(f"{label} {place:.3g} ms", (place, top), (-4 if side == "right" else 4, 0), va="top", ha=side,
                       textcoords="offset points", fontsize=8.5, color=MUTED)

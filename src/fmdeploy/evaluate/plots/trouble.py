"""Trouble: one row a fault, the share of frames published as valid beside what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fmdeploy.evaluate.plots.figure import INK, LOOKS, MUTED, Picture, canvas, to_svg

ROW_INCHES = 0.3


@dataclass(frozen=True)
class Bar:
    """One fault: share of frames published as valid, the metric of those, and the metric with nobody looking."""

    name: str
    valid: float
    value_valid: float | None
    value_unguarded: float | None


def plot_trouble(metric: str, bars: Sequence[Bar]) -> Picture:
    """Left the share that is valid; right the metric of the valid frames, and of all frames without a runtime."""
    rows = np.arange(len(bars))[::-1]
    with canvas("trouble", 7.6, 1.0 + ROW_INCHES * len(bars), ncols=2, sharey=True) as (figure, (left, right)):
        left.barh(rows, [100 * bar.valid for bar in bars], color=LOOKS["int8"].color, height=0.55, alpha=0.8)
        left.set_xlim(0, 105)
        left.set_xlabel("% published as valid")
        left.set_yticks(rows, [bar.name for bar in bars], color=INK)
        left.set_ylim(-0.7, len(bars) - 0.3)
        shown = [(row, bar.value_valid) for row, bar in zip(rows, bars, strict=True) if bar.value_valid is not None]
        alone = [(row, bar.value_unguarded) for row, bar in zip(rows, bars, strict=True)
                 if bar.value_unguarded is not None]
        right.plot([v for _, v in alone], [r for r, _ in alone], linestyle="none", marker="x", markersize=5,
                   color=LOOKS["baseline"].color, label="all frames, without the runtime")
        right.plot([v for _, v in shown], [r for r, _ in shown], linestyle="none", marker="D", markersize=4.5,
                   color=LOOKS["int8"].color, label="frames published as valid")
        if bars[0].value_valid is not None:
            right.axvline(bars[0].value_valid, color=MUTED, linewidth=0.8, linestyle=":")
        right.set_xlim(left=0)
        right.set_xlabel(metric)
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper left", ncols=2)
        svg = to_svg(figure, "trouble")
    said = "; ".join(f"{bar.name}: {bar.valid:.0%} valid" for bar in bars)
    return Picture(svg, f"Validity and {metric} under {len(bars)} conditions. {said}.")

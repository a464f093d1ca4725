"""Reliability diagrams: does "70 % sure" come true 70 % of the time?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fmdeploy.evaluate.plots.figure import LOOKS, MUTED, Picture, canvas, to_svg


@dataclass(frozen=True)
class Bins:
    """One model's bins: mean confidence, observed frequency, number of predictions (each (M,)), and its error."""

    name: str
    look: str
    confidence: npt.NDArray[np.float64]
    frequency: npt.NDArray[np.float64]
    count: npt.NDArray[np.float64]
    error: float


def plot_reliability(metric: str, models: Sequence[Bins]) -> Picture:
    """Observed frequency over confidence, and below it how many predictions each bin holds (log scale)."""
    name = f"reliability-{metric}"
    with canvas(name, 3.7, 3.9, nrows=2, sharex=True, height_ratios=[3, 1]) as (figure, (diagram, counts)):
        diagram.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle=":")
        for model in models:
            _draw(diagram, counts, model)
        diagram.set(xlim=(0, 1), ylim=(0, 1), ylabel="observed frequency")
        diagram.set_aspect("auto")
        counts.set_yscale("log")
        counts.set(xlabel="predicted probability", ylabel="count")
        counts.minorticks_off()
        counts.yaxis.set_major_formatter("{x:g}")
        diagram.legend(loc="upper left")
        svg = to_svg(figure, name)
    said = ", ".join(f"{m.name} {m.error:.3f}" for m in models)
    return Picture(svg, f"Reliability diagram. Expected calibration error ({metric}): {said}.", f"{metric}: {said}")


def _draw(diagram: Any, counts: Any, model: Bins) -> None:
    look = LOOKS[model.look]
    filled = model.count > 0
    diagram.plot(model.confidence[filled], model.frequency[filled], color=look.color, marker=look.marker, markersize=4,
                 linestyle=look.dash, label=model.name, linewidth=1.4)
    edges = np.linspace(0, 1, len(model.count) + 1)
    counts.stairs(np.maximum(model.count, 0.5), edges, baseline=0.5, color=look.color, linestyle=look.dash,
                  linewidth=1.2)

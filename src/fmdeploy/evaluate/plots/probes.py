"""Probes over training: one small panel a rung, one line a network, its 95 % interval as a band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fmdeploy.evaluate.plots.figure import LOOKS, Picture, canvas, to_svg

Points = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Growth:
    """Rung → points (4, S) of one training run: steps, values, lower and upper ends; NaN where not measured."""

    name: str
    look: str
    series: Mapping[str, Points]


def plot_probes(growths: Sequence[Growth], metrics: Mapping[str, str]) -> Picture:
    """Every rung's value over the steps.

    Args:
        growths: One for each training run.
        metrics: Rung → what its value is; the panels, in order.
    """
    with canvas("probes", 7.6, 2.7, ncols=len(metrics), squeeze=False) as (figure, axes):
        for panel, (rung, metric) in zip(axes.flat, metrics.items(), strict=True):
            for growth in growths:
                if rung not in growth.series:
                    continue
                steps, values, low, high = growth.series[rung]
                look = LOOKS[growth.look]
                panel.plot(steps, values, color=look.color, marker=look.marker, linestyle=look.dash, markersize=4,
                           label=growth.name)
                panel.fill_between(steps, low, high, color=look.color, alpha=0.15, linewidth=0)
            panel.set_title(rung)
            panel.set_xlabel("step")
            panel.set_ylabel(metric)
            panel.set_xlim(left=0)
        if len(growths) > 1:
            axes.flat[0].legend(loc="lower right")
        svg = to_svg(figure, "probes")
    return Picture(svg, f"Probes over training. {'; '.join(_said(growth) for growth in growths)}.")


def _said(growth: Growth) -> str:
    lines = [f"{rung} {points[1, 0]:.3f} to {points[1, -1]:.3f}" for rung, points in growth.series.items()]
    return f"{growth.name}: {', '.join(lines)}"

"""Accuracy: per output channel (horizon) and per slice, each with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmdeploy.evaluate.bootstrap import Interval
from fmdeploy.evaluate.plots.figure import GRID, INK, LOOKS, MUTED, Picture, canvas, to_svg

ROW_INCHES = 0.36
MODEL_STEP = 0.18


@dataclass(frozen=True)
class Curve:
    """The values of one model; `intervals[i]` belongs to label i of the plot."""

    name: str
    look: str
    intervals: tuple[Interval, ...]


def plot_channels(metric: str, labels: Sequence[str], curves: Sequence[Curve]) -> Picture:
    """One line a model over the channels (horizons) of the primary metric, whiskers = intervals."""
    with canvas("channels", 7.6, 3.5) as (figure, axes):
        places = np.arange(len(labels))
        for number, curve in enumerate(curves):
            _line(axes, places + (number - (len(curves) - 1) / 2) * 0.04, curve)
        axes.set_xticks(places, labels)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(metric)
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside upper left", ncols=4)
        svg = to_svg(figure, "channels")
    said = "; ".join(f"{c.name}: {', '.join(f'{i.value:.3f}' for i in c.intervals)}" for c in curves)
    return Picture(svg, f"{metric} at {', '.join(labels)}. {said}.")


def _line(axes: Any, places: Any, curve: Curve) -> None:
    look = LOOKS[curve.look]
    values, spread = _spread(curve.intervals)
    axes.errorbar(places, values, yerr=spread, label=curve.name, color=look.color, marker=look.marker, markersize=5,
                  linestyle=look.dash, elinewidth=1.1, capsize=2.5)


def _spread(intervals: Sequence[Interval]) -> tuple[Any, Any]:
    """Values and distances to both ends; an unmeasured end has no whisker."""
    values = np.array([i.value for i in intervals])
    ends = np.array([[i.value - i.low for i in intervals], [i.high - i.value for i in intervals]])
    return values, np.nan_to_num(np.maximum(ends, 0.0), nan=0.0)


def plot_slices(metric: str, names: Sequence[str], curves: Sequence[Curve]) -> Picture:
    """One row a slice, one dot a model, whiskers = intervals."""
    with canvas("slices", 7.6, 1.0 + ROW_INCHES * len(names)) as (figure, axes):
        rows = np.arange(len(names))[::-1]
        for number, curve in enumerate(curves):
            look = LOOKS[curve.look]
            values, spread = _spread(curve.intervals)
            axes.errorbar(values, rows - (number - (len(curves) - 1) / 2) * MODEL_STEP, xerr=spread, label=curve.name,
                          color=look.color, marker=look.marker, markersize=4.5, linestyle="none", elinewidth=1.2)
        _between_axes(axes, names)
        axes.set_yticks(rows, names, color=INK)
        axes.set_ylim(-0.7, len(names) - 0.3)
        axes.set_xlim(left=-0.015 * axes.get_xlim()[1])  # a marker at zero is seen whole
        axes.set_xlabel(metric)
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper left", ncols=4)
        svg = to_svg(figure, "slices")
    said = "; ".join(
        f"{name}: {', '.join(f'{c.name} {c.intervals[k].value:.3f}' for c in curves)}" for k, name in enumerate(names)
    )
    return Picture(svg, f"{metric} in {len(names)} slices. {said}.")


def _between_axes(axes: Any, names: Sequence[str]) -> None:
    """A faint line between rows, a stronger one where the slicing changes, such as from scenario to weather."""
    kinds = [name.removeprefix("not ").partition("=")[0] for name in names]
    for k in range(1, len(kinds)):
        changes = kinds[k] != kinds[k - 1]
        axes.axhline(len(kinds) - k - 0.5, color=MUTED if changes else GRID, linewidth=1.0 if changes else 0.5)

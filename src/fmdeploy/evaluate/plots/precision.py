"""Sensitivity bars and the Pareto front of mixed precision: what INT8 costs where, and what keeping it away costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmdeploy.evaluate.plots.figure import INK, LOOKS, MUTED, Picture, canvas, to_svg

ROW_INCHES = 0.21
MAX_ROWS = 40
FAIL = "#010117"


@dataclass(frozen=True)
class Bar:
    """One layer: dB of the worst output when it alone is quantised; relative drops alone, and with all others."""

    name: str
    alone_db: float
    alone_drop: float | None
    without_drop: float | None


@dataclass(frozen=True)
class Point:
    """One candidate: predicted microseconds, relative drop with its interval, layers kept in float, and its role."""

    microseconds: float
    drop: float
    low: float
    high: float
    kept: int
    on_front: bool
    chosen: bool


def plot_sensitivity(metric: str, bars: Sequence[Bar], everything: float | None) -> Picture:
    """Left: noise that each layer brings alone. Right: the metric's drop with it alone, and with all but it.

    Args:
        metric: Whose relative drop.
        bars: The noisiest first; the first `MAX_ROWS` are drawn.
        everything: Drop with all layers quantised; None where it is undefined.
    """
    shown = bars[:MAX_ROWS]
    rows = np.arange(len(shown))[::-1]
    with canvas("sensitivity", 7.6, 1.1 + ROW_INCHES * len(shown), ncols=2, sharey=True) as (figure, (noise, drops)):
        noise.barh(rows, [b.alone_db for b in shown], height=0.7, color=LOOKS["int8"].color, alpha=0.75)
        noise.set_yticks(rows, [b.name for b in shown], color=INK)
        noise.set_ylim(-0.7, len(shown) - 0.3)
        noise.set_xlabel("SQNR of the worst output, dB (shorter: noisier)")
        noise.set_title("quantised alone")
        for label, look, values in (("alone", "int8", [b.alone_drop for b in shown]),
                                    ("all but it", "student", [b.without_drop for b in shown])):
            percents = [np.nan if v is None else 100 * v for v in values]
            drops.plot(percents, rows, linestyle="none", marker=LOOKS[look].marker, markersize=4.5,
                       color=LOOKS[look].color, label=label)
        if everything is not None:
            drops.axvline(100 * everything, color=MUTED, linestyle="--", linewidth=1.0, label="all layers")
        drops.set_xlabel(f"drop of {metric}, %")
        drops.legend(loc="lower right")
        svg = to_svg(figure, "sensitivity")
    said = "; ".join(f"{b.name} {b.alone_db:.1f} dB" for b in shown[:5])
    more = f"The {len(shown)} noisiest of {len(bars)} layers." if len(shown) < len(bars) else ""
    return Picture(svg, f"Layers by the noise that INT8 brings alone, the noisiest first: {said}.", more)


def plot_pareto(metric: str, points: Sequence[Point], max_drop: float, device: str) -> Picture:
    """Predicted latency against the metric's drop; the front is joined, the chosen set is named.

    Args:
        metric: Whose relative drop.
        points: All candidates that were run.
        max_drop: The limit.
        device: For which latency was predicted.
    """
    with canvas("pareto", 7.6, 3.6) as (figure, axes):
        for points_of, marker, color, label in (
            ([p for p in points if not p.on_front], "x", MUTED, "tried"),
            ([p for p in points if p.on_front], LOOKS["int8"].marker, LOOKS["int8"].color, "Pareto front"),
        ):
            _scatter(axes, points_of, marker, color, label)
        front = sorted((p for p in points if p.on_front), key=lambda p: p.microseconds)
        axes.step([p.microseconds for p in front], [100 * p.drop for p in front], where="post",
                  color=LOOKS["int8"].color, linewidth=1.2)
        axes.axhline(100 * max_drop, color=FAIL, linestyle="--", linewidth=1.0, label="limit")
        for p in (p for p in points if p.chosen):
            axes.annotate(f"chosen: {p.kept} in float", (p.microseconds, 100 * p.drop), (8, 10), color=INK,
                          textcoords="offset points", fontsize=9)
        axes.set_xlabel(f"predicted latency on {device}, µs")
        axes.set_ylabel(f"drop of {metric}, %")
        axes.legend(loc="upper right")
        svg = to_svg(figure, "pareto")
    said = "; ".join(f"{p.kept} layers in float: {p.microseconds:.0f} µs, {100 * p.drop:.2f} %" for p in front)
    return Picture(svg, f"Latency against drop of {metric}. Front: {said}.")


def _scatter(axes: Any, points: Sequence[Point], marker: str, color: str, label: str) -> None:
    if not points:
        return
    values = np.array([p.drop for p in points])
    ends = np.array([[p.drop - p.low for p in points], [p.high - p.drop for p in points]])
    spread = np.nan_to_num(np.maximum(ends, 0.0), nan=0.0)
    axes.errorbar([p.microseconds for p in points], 100 * values, yerr=100 * spread, linestyle="none", marker=marker,
                  markersize=5, color=color, label=label, elinewidth=0.8, alpha=0.9)

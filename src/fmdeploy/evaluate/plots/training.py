"""Learning curves: one small panel a model, because losses of different objectives cannot share an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fmdeploy.evaluate.plots.figure import INK, LOOKS, Picture, canvas, to_svg

WINDOWS = 25  # the running mean is over this part of all steps
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class History:
    """Named series (2, S) of one training run: steps, and values at those steps; the sum of the losses first."""

    name: str
    look: str
    series: Mapping[str, npt.NDArray[np.float64]]


def plot_training(histories: Sequence[History]) -> Picture:
    """Loss over steps: the faint line is every step, the strong one a running mean; dashes are parts of the loss."""
    with canvas("training", 7.6, 2.9, ncols=len(histories), squeeze=False) as (figure, axes):
        for panel, history in zip(axes.flat, histories, strict=True):
            _draw(panel, history)
        axes.flat[0].set_ylabel("loss")
        svg = to_svg(figure, "training")
    return Picture(svg, f"Training loss over steps. {'; '.join(_said(h) for h in histories)}.")


def _draw(panel: Any, history: History) -> None:
    look = LOOKS[history.look]
    highest = 0.0
    shown = list(history.series.items())
    for number, (name, (steps, values)) in enumerate(shown if len(shown) > 2 else shown[:1]):
        smooth = running_mean(values)
        if number == 0:
            panel.plot(steps, values, color=look.color, alpha=0.22, linewidth=0.7)
        panel.plot(steps, smooth, color=look.color if number == 0 else INK, linestyle=DASHES[number % len(DASHES)],
                   linewidth=1.7 if number == 0 else 1.1, alpha=1.0 if number == 0 else 0.75, label=name)
        highest = max(highest, float(np.quantile(values, 0.995)) * 1.05)
    panel.set_title(history.name)
    panel.set_xlabel("step")
    panel.set_ylim(0, highest or 1.0)
    panel.set_xlim(left=0)
    if len(shown) > 2:  # two: the sum and its only part
        panel.legend(loc="upper right")


def running_mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean over a centred window (S,) → (S,): a one-sided one lags behind a falling loss. Shorter at both ends."""
    box = np.ones(2 * (len(values) // WINDOWS // 2) + 1)
    mean: npt.NDArray[np.float64] = np.convolve(values, box, "same") / np.convolve(np.ones_like(values), box, "same")
    return mean


def _said(history: History) -> str:
    steps, values = next(iter(history.series.values()))
    smooth = running_mean(values)
    return f"{history.name} {smooth[0]:.3f} to {smooth[-1]:.3f} in {int(steps[-1]) + 1} steps"

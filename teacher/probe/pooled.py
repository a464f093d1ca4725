"""Pooled features as probes read them, and the metrics of their answers.

Legend: N samples, P pooled features, K statistics of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fmdeploy.arrays import Array
from fmdeploy.teacher.probe.view import View

TINY = 1e-6


@dataclass
class Mean:
    """A mean over samples, as statistics (sum, count)."""

    name: str
    higher_is_better: bool = True

    def statistics(self, outputs: object, targets: object) -> Array:
        """Not used: rungs make the statistics themselves."""
        raise NotImplementedError

    def value(self, total: Array) -> Array:
        """Sum / count; NaN without samples."""
        count = np.asarray(total[..., 1], np.float64)
        return np.where(count > 0, total[..., 0] / np.where(count > 0, count, 1.0), np.nan)


def counted(values_N: Array) -> Array:
    """Statistics (N, 2) of one value a sample."""
    values = np.asarray(values_N, np.float64)
    return np.stack([values, np.ones_like(values)], axis=1)


def standardised(view: View, split: str) -> Tensor:
    """Pooled features float64 (N, P) of `split`, with the mean and the spread of the train split taken out."""
    mean_P, spread_P = view.once("pooled statistics", lambda: _statistics(view))
    return (view.pooled(split).double() - mean_P) / spread_P


def _statistics(view: View) -> tuple[Tensor, Tensor]:
    train_NP = view.pooled("train").double()
    return train_NP.mean(0), train_NP.std(0, unbiased=False).clamp_min(TINY)

"""Numbers about predicted futures, as functions of sums over samples so that intervals cost nothing.

Legend: N samples, T later frames, H W cells, R pairs of one sample, K statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fmdeploy.evaluate.metrics import ECE, Array, IoU

THRESHOLDS = np.linspace(0.02, 0.98, 49)
TINY = 1e-6


@dataclass
class Mean:
    """A mean. Statistics: (sum, count)."""

    name: str
    higher_is_better: bool = True

    def value(self, total: Array) -> Array:
        """Return sum / count; NaN where nothing was counted."""
        count = np.where(total[..., 1] > 0, total[..., 1], np.nan)
        return np.asarray(total[..., 0] / count)

    def statistics(self, outputs: dict[str, Array], targets: dict[str, Array]) -> Array:
        """Return (N, 2) of the values `outputs[name]` (N, ...)."""
        rows = np.asarray(outputs[self.name], np.float64).reshape(len(outputs[self.name]), -1)
        return np.stack([rows.sum(1), np.full(len(rows), float(rows.shape[1]))], 1)


def mean_rows(values: Array) -> Array:
    """Statistics (N, 2) of `Mean` for values (N, ...)."""
    return Mean("rows").statistics({"rows": values}, {})


@dataclass
class Overlap(IoU):
    """IoU of binary futures, mean over frames: statistics as in `IoU`, (N, 2T), made by `overlap_rows`."""

    name: str = "iou"


@dataclass
class OverlapGain:
    """IoU of one prediction minus that of another. Statistics: those of both, side by side (N, 4T)."""

    name: str
    frames: int
    higher_is_better: bool = True

    def value(self, total: Array) -> Array:
        """Return the difference of the two means over frames."""
        overlap, half = Overlap(channels=tuple(range(self.frames))), 2 * self.frames
        return np.asarray(overlap.value(total[..., :half]) - overlap.value(total[..., half:]))

    def statistics(self, outputs: dict[str, Array], targets: dict[str, Array]) -> Array:
        """Return (N, 4T) of the binary pictures `outputs[a]` and `outputs[b]`, in the order of the names."""
        (truth,) = targets.values()
        return np.concatenate([overlap_rows(each, truth) for each in outputs.values()], axis=1)


@dataclass
class Correlation:
    """Pearson's correlation. Statistics: (n, x, y, xx, yy, xy) summed; NaN where x or y does not vary."""

    name: str = "pearson"
    higher_is_better: bool = field(default=True, init=False)

    def value(self, total: Array) -> Array:
        """Return cov(x, y) / sqrt(var(x) var(y))."""
        n, x, y, xx, yy, xy = (total[..., k] for k in range(6))
        n = np.where(n > 0, n, np.nan)
        spread_x, spread_y = xx / n - (x / n) ** 2, yy / n - (y / n) ** 2
        varies = (spread_x > TINY * np.maximum(xx / n, TINY)) & (spread_y > TINY * np.maximum(yy / n, TINY))
        bottom = np.sqrt(np.where(varies, spread_x * spread_y, 1.0))
        return np.where(varies, (xy / n - x * y / n**2) / bottom, np.nan)

    def statistics(self, outputs: dict[str, Array], targets: dict[str, Array]) -> Array:
        """Return (N, 6) of the pairs `outputs[name]`, `targets[name]`, (N, R) each."""
        x, y = (np.asarray(each[self.name], np.float64) for each in (outputs, targets))
        columns = (np.ones_like(x), x, y, x * x, y * y, x * y)
        return np.stack([column.reshape(len(x), -1).sum(1) for column in columns], 1)


def correlation_rows(x_NR: Array, y_NR: Array) -> Array:
    """Statistics (N, 6) of `Correlation`."""
    return Correlation("pair").statistics({"pair": x_NR}, {"pair": y_NR})


def ranks(values: Array) -> Array:
    """Ranks of all values together, ties in the middle, same shape: Pearson of ranks is Spearman's correlation.

    The bootstrap keeps these ranks: ranking each draw anew would cost a sort a draw and moves the interval little.
    """
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    middle = last - (count - 1) / 2
    return np.asarray(middle[place.reshape(values.shape)], np.float64)


def best_threshold(said: Array) -> float:
    """The threshold that promises the highest IoU, judged by the probabilities themselves, without the truth.

    Calling the cells above it occupied, sum of p over those is the expected intersection, and their number plus the
    sum of p over the others the expected union. For a binary map any threshold promises 1, and 0.5 is taken.

    Args:
        said: Probabilities of any shape.
    """
    flat = np.sort(np.asarray(said, np.float64).ravel())
    tail = np.concatenate([np.cumsum(flat[::-1])[::-1], [0.0]])
    first = np.searchsorted(flat, THRESHOLDS, side="right")
    union = (len(flat) - first) + (tail[0] - tail[first])
    promised = np.where(union > 0, tail[first] / np.maximum(union, TINY), 0.0)
    near = np.flatnonzero(promised >= promised.max() - 1e-9)
    return float(THRESHOLDS[near[np.abs(THRESHOLDS[near] - 0.5).argmin()]])


def decided(said_NTHW: Array) -> Array:
    """Binary pictures (N, T, H, W): each frame's probabilities at its own `best_threshold`."""
    frames = [said_NTHW[:, t] > best_threshold(said_NTHW[:, t]) for t in range(said_NTHW.shape[1])]
    return np.stack(frames, axis=1)


def overlap_rows(binary_NTHW: Array, truth_NTHW: Array) -> Array:
    """Statistics (N, 2T) of `Overlap`: intersections, unions in cells."""
    predicted, present = binary_NTHW != 0, truth_NTHW != 0
    both, either = (np.count_nonzero(each, axis=(2, 3)) for each in (predicted & present, predicted | present))
    return np.concatenate([both, either], axis=1).astype(np.float64)


def ece_of(frames: int) -> ECE:
    """Calibration error over all cells of `frames` later frames."""
    return ECE(channels=tuple(range(frames)))


def ece_rows(said_NTHW: Array, truth_NTHW: Array) -> Array:
    """Statistics of `ece_of`, which takes logits."""
    p = np.clip(np.asarray(said_NTHW, np.float32), TINY, 1 - TINY)
    return ece_of(p.shape[1]).statistics({"bev": np.log(p) - np.log1p(-p)}, {"bev": truth_NTHW})


def brier_rows(said_NTHW: Array, truth_NTHW: Array) -> Array:
    """Statistics of `Mean`: squared error of the probabilities (Brier, Monthly Weather Review 78, 1950)."""
    error = np.asarray(said_NTHW, np.float32) - (truth_NTHW != 0)
    return mean_rows(np.square(error))

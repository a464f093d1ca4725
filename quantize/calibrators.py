"""Calibrators: from the histogram of a tensor to the largest magnitude that its INT8 grid holds.

    max         nothing is cut off
    percentile  99.99 % of the values other than zero are held
    mse         least expected squared error, rounding and clipping together
    entropy     least KL divergence between the values and their 128 levels (the TensorRT recipe)

All of them are functions `Histogram → amax`; a tensor of zeros has the range 0. Zeros count nowhere: they are exact on
every grid. None returns more than the largest magnitude. Sources at each.
"""

# M candidate ranges, L levels of the grid, E edges of levels, K bins

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import numpy as np

from fmdeploy.errors import ConfigError
from fmdeploy.quantize.grid import STEPS
from fmdeploy.quantize.histogram import Histogram, Reals

Calibrator = Literal["max", "entropy", "percentile", "mse", "auto"]
NAMES: tuple[Calibrator, ...] = get_args(Calibrator)
PERCENT = 99.99  # pytorch-quantization's and modelopt's default
LEVELS = 128  # magnitudes of a signed 8-bit grid: 0 to 127
SMALLEST_SHARE = 1 / 64  # of the largest magnitude: the narrowest range that `mse` tries
LEAST_HELD = 0.99  # share of the values that a range of `entropy` must hold
EQUAL = 1e-9  # divergences that differ by less are rounding errors of the same
COARSE, FINE = 96, 48  # ranges that `mse` tries, and tries again around the best


def largest(histogram: Histogram) -> float:
    """The largest magnitude (arXiv:2004.09602, section 3.3, "max")."""
    return histogram.largest


def percentile(histogram: Histogram, percent: float = PERCENT) -> float:
    """The magnitude that `percent` of the values other than zero do not exceed (arXiv:2004.09602, section 3.3)."""
    return histogram.percentile(percent)


def mean_squared_error(histogram: Histogram) -> float:
    """The range of least expected squared error of round-to-nearest and clipping.

    The search over ranges of arXiv:1810.05723 (ACIQ) and of LAPQ, arXiv:1911.07190, on the histogram itself instead of
    on a fitted density. Ranges are tried in equal ratios, then finer around the best; equal errors prefer the wider.
    """
    if not histogram.largest:
        return 0.0
    ratios = np.geomspace(1.0, SMALLEST_SHARE, COARSE)
    best = ratios[int(np.argmin(squared_errors(histogram, histogram.largest * ratios)))]
    step = ratios[0] / ratios[1]
    finer = np.geomspace(min(best * step, 1.0), best / step, FINE)
    return float(histogram.largest * finer[int(np.argmin(squared_errors(histogram, histogram.largest * finer)))])


def squared_errors(histogram: Histogram, ranges_M: Reals) -> Reals:
    """Return the summed squared error that each range (M,) would cause on the values of `histogram`: (M,).

    Every value stands at the centre of its bin, which is at most a sixteenth of a step wide. A level's share of the
    error is Σ c x² - 2 q Σ c x + q² Σ c over its bins; running sums make that three differences.
    """
    centres, counts = histogram.magnitudes()
    sums = [np.concatenate([[0.0], np.cumsum(counts * centres**power)]) for power in (0, 1, 2)]
    levels_ML = ranges_M[:, None] / STEPS * np.arange(LEVELS)
    middles_ME = levels_ML[:, :-1] + levels_ML[:, 1:2] / 2
    inner_ME = np.searchsorted(centres, middles_ME)
    ends = np.zeros((len(ranges_M), 1), np.int64), np.full((len(ranges_M), 1), len(centres))
    edges_ME = np.concatenate([ends[0], inner_ME, ends[1]], axis=1)  # beyond the last middle all is clipped
    count, first, second = (np.diff(row[edges_ME], axis=1) for row in sums)
    return np.asarray((second - 2 * levels_ML * first + levels_ML**2 * count).sum(axis=1))


def entropy(histogram: Histogram) -> float:
    """The range of least KL divergence between the distribution of magnitudes and its 128-level version.

    S. Migacz, "8-bit inference with TensorRT", GTC 2017, slides 33 to 39; also arXiv:2004.09602, section 3.3. Ties
    prefer the wider range, and the first bin, whose values round to zero, counts as many as the second. One departure:
    ranges that cut off more than 1 % of the values are not tried. Where a few values make up most of a tensor (binary
    inputs and what a convolution makes of them) the divergence of a range just above them is small whatever it cuts.
    """
    counts, width = histogram.uniform()
    if len(counts) <= LEVELS:
        return histogram.largest
    divergence_M = divergences(counts)
    held_M = np.cumsum(counts)[LEVELS - 1 :] / counts.sum()
    divergence_M = np.where(held_M >= LEAST_HELD, divergence_M, np.inf)
    best = int(np.flatnonzero(divergence_M <= divergence_M.min() + EQUAL)[-1])
    return min((LEVELS + best) * width, histogram.largest)


def divergences(counts_K: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Reals:
    """Return the KL divergence for the ranges of 128, 129, ..., K equal bins: (K - 127,).

    For a range of i bins, P is the first i counts, with all that lies beyond added to the last that is not empty; Q
    spreads the counts of each of 128 groups evenly over those of its bins that are not empty. Q is constant inside a
    group, so with S and n the sum and the number of bins that are not empty of a group, Σ p log q = Σ S log(S / n):
    prefix sums give every range in 128 steps. (The recipe adds to the last bin, empty or not, and is undefined where it
    is empty; where it is not, both agree.)
    """
    counts = counts_K.astype(np.float64)
    counts[0] = counts[1]
    sizes_M = np.arange(LEVELS, len(counts) + 1)
    edges_ML = -(-sizes_M[:, None] * np.arange(LEVELS + 1) // LEVELS)
    sums, filled, logs = (np.concatenate([[0.0], np.cumsum(row)]) for row in (counts, counts > 0, _x_log_x(counts)))
    group_ML, number_ML = np.diff(sums[edges_ML], axis=1), np.diff(filled[edges_ML], axis=1)
    log_q_ML = np.log(np.where(number_ML > 0, group_ML, 1.0) / np.maximum(number_ML, 1.0))
    place_M = np.maximum.accumulate(np.where(counts > 0, np.arange(len(counts)), 0))[sizes_M - 1]
    last_M, beyond_M, held_M = counts[place_M], sums[-1] - sums[sizes_M], sums[sizes_M]
    p_log_p = logs[sizes_M] - _x_log_x(last_M) + _x_log_x(last_M + beyond_M)
    last_log_q = log_q_ML[np.arange(len(sizes_M)), place_M * LEVELS // sizes_M]
    p_log_q = (group_ML * log_q_ML).sum(axis=1) + beyond_M * last_log_q
    found = (p_log_p - p_log_q) / sums[-1] - np.log(sums[-1]) + np.log(np.where(held_M > 0, held_M, 1.0))
    return np.asarray(np.where(held_M > 0, found, np.inf))


def _x_log_x(values: Reals) -> Reals:
    return np.asarray(values * np.log(np.where(values > 0, values, 1.0)))


def calibrators(percent: float = PERCENT) -> Mapping[str, Callable[[Histogram], float]]:
    """Return every calibrator that looks at one histogram alone, by name, in the order in which ties are settled."""
    if not 50 <= percent <= 100:
        raise ConfigError("is no percentile for a range", where="percentile", expected="50 to 100", found=percent)
    return {"max": largest, "mse": mean_squared_error, "percentile": partial(percentile, percent=percent),
            "entropy": entropy}

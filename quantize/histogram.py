"""Histograms of |x| whose state depends on the values alone, never on their batches or their order.

A bin is the set of float32 numbers with equal exponent and equal leading mantissa bits, so its place is fixed before
any value is seen: 2048 bins an octave, each 2^-11 to 2^-12 as wide as the values in it. Two states are merged by adding
their counts, which commutes. (Bins laid over the range of the first batch, as in TensorRT-style calibrators, give other
ranges for another batch size: Model-Optimizer issue 619.)

Exact zeros are counted apart: every symmetric grid holds zero exactly, and behind a ReLU they are most of a tensor and
would drown what the calibrators look at.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fmdeploy.errors import DataError

Counts = NDArray[np.int64]
Reals = NDArray[np.float64]

BITS = 11  # leading mantissa bits that make a bin
SHIFT = 23 - BITS  # float32 has 23
NOT_FINITE = 0xFF << BITS  # first bin of infinity and NaN
MAGNITUDE = 0x7FFFFFFF  # every bit but the sign
FLUSH = 1 << 19  # values that are gathered before they are counted: counting pays per call, too


@dataclass
class Histogram:
    """Counts of magnitudes of one tensor, and its smallest and largest value.

    Attributes:
        low: Smallest value seen; infinite before the first.
        high: Largest value seen; minus infinity before the first.
    """

    low: float = math.inf
    high: float = -math.inf
    _counts: Counts = field(default_factory=lambda: np.zeros(0, np.int64))
    _waiting: list[Tensor] = field(default_factory=list)
    _gathered: int = 0
    _filled: tuple[Counts, Counts] | None = None

    def see(self, values: Tensor, where: str = "") -> None:
        """Note smallest and largest of `values` (any shape, not empty) without counting them.

        Raises:
            DataError: one of them is NaN or infinite; the text names `where`.
        """
        low, high = (float(end) for end in torch.aminmax(values.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError("calibration drove this tensor to NaN or infinity", where=where or None)
        self.low, self.high = min(self.low, low) + 0.0, max(self.high, high) + 0.0  # + 0.0 makes one zero of ±0

    def count(self, values: Tensor) -> None:
        """Count finite float32 `values` of any shape, without noting smallest and largest."""
        bits = values.detach().float().contiguous().view(torch.int32)
        self._waiting.append(bits.bitwise_and(MAGNITUDE).bitwise_right_shift_(SHIFT).flatten())
        self._gathered += bits.numel()
        if self._gathered >= FLUSH:
            self._flush()

    def add(self, values: Tensor, where: str = "") -> None:
        """Note and count `values` of any shape, float32.

        Raises:
            DataError: one of them is NaN or infinite; the text names `where`.
        """
        if values.numel():
            self.see(values, where)
            self.count(values)

    def merge(self, other: Histogram) -> Histogram:
        """Return the histogram of both; `merge` commutes and associates, and changes neither."""
        merged = Histogram(min(self.low, other.low), max(self.high, other.high))
        for each in (self, other):
            each._flush()
            merged._add_counts(each._counts)
        return merged

    def _flush(self) -> None:
        if self._waiting:
            places = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
            self._waiting, self._gathered = [], 0
            self._add_counts(torch.bincount(places).numpy())

    def _add_counts(self, counts: Counts) -> None:
        self._filled = None
        if len(counts) > len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(len(counts) - len(self._counts), np.int64)])
        self._counts[: len(counts)] += counts

    def bins(self) -> tuple[Counts, Counts]:
        """Return the numbers of the bins that hold something, ascending, and their counts; zero is bin 0."""
        self._flush()
        if self._filled is None:
            places = np.flatnonzero(self._counts)
            self._filled = places, self._counts[places]
        return self._filled

    @property
    def digest(self) -> str:
        """sha256 of the state."""
        places, counts = self.bins()
        sha = hashlib.sha256(np.array([self.low, self.high], "<f8").tobytes())
        sha.update(np.concatenate([places, counts]).astype("<i8").tobytes())
        return sha.hexdigest()

    @property
    def largest(self) -> float:
        """The largest magnitude, exactly; 0 where nothing was seen."""
        return max(abs(self.low), abs(self.high)) if self.total else 0.0

    @property
    def total(self) -> int:
        """Values counted, zeros among them."""
        return int(self.bins()[1].sum())

    @property
    def zeros(self) -> int:
        """Values that are exactly zero (or below 2^-137, which float32 barely holds)."""
        places, counts = self.bins()
        return int(counts[0]) if len(places) and places[0] == 0 else 0

    def magnitudes(self) -> tuple[Reals, Counts]:
        """Return the centres of the bins that hold something other than zero, ascending, and their counts."""
        places, counts = self.bins()
        if len(places) and places[0] == 0:
            places, counts = places[1:], counts[1:]
        return _centres(places), counts

    def root_mean_square(self) -> float:
        """√(mean of x²) over all values, zeros among them; within 2^-11 of the exact one."""
        centres, counts = self.magnitudes()
        return math.sqrt(float(counts @ centres**2) / self.total) if self.total else 0.0

    def percentile(self, percent: float) -> float:
        """The magnitude that `percent` of the values other than zero do not exceed (a bin's upper edge)."""
        places, counts = self.bins()
        if len(places) and places[0] == 0:
            places, counts = places[1:], counts[1:]
        if not len(places):
            return 0.0
        reached = np.cumsum(counts)
        place = places[int(np.searchsorted(reached, percent / 100 * reached[-1]))]
        return min(float(_lower_edge(place + 1)), self.largest) if place + 1 < NOT_FINITE else self.largest

    def share_above(self, magnitude: float) -> float:
        """Share of all values whose bin lies above `magnitude`."""
        places, counts = self.bins()
        return float(counts[_lower_edge(places) >= magnitude].sum()) / self.total if self.total else 0.0

    def uniform(self) -> tuple[Counts, float]:
        """Return counts over equal bins that start at 0, and the width of a bin.

        The width is 2^-12 of the smallest power of two above the largest magnitude, so that at least 2049 of these
        bins are needed; every bin is a union of bins of the state, hence the counts are exact. Zeros are left out.
        """
        places, counts = self.bins()
        if len(places) and places[0] == 0:
            places, counts = places[1:], counts[1:]
        if not len(places):
            return np.zeros(0, np.int64), 0.0
        lower = _lower_edge(places)
        _, exponent = math.frexp(float(lower[-1]))
        width = math.ldexp(1.0, exponent - BITS - 1)
        index = np.floor(lower / width).astype(np.int64)
        return np.bincount(index, weights=counts).astype(np.int64), width

    def summary(self, amax: float) -> dict[str, Any]:
        """Describe the histogram and what a range of `amax` cuts off, as plain numbers."""
        rms = self.root_mean_square()
        return {
            "rms": rms,
            "max_over_rms": self.largest / rms if rms else 0.0,
            "percentiles": {f"{p:g}": self.percentile(p) for p in (50, 99, 99.9, 99.99)},
            "zeros": self.zeros / max(self.total, 1),
            "clipped": self.share_above(amax),
            "histogram": self.digest,
        }


def _centres(places: Counts) -> Reals:
    """The middle of each bin."""
    return (_lower_edge(places) + _lower_edge(np.minimum(places + 1, NOT_FINITE - 1))) / 2


def _lower_edge(places: Any) -> Reals:
    """The smallest float32 of each bin, as float64."""
    bits = np.asarray(places, np.int64) << SHIFT
    return np.asarray(bits.astype(np.int32).view(np.float32), np.float64)

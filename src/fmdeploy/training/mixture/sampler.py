"""Draws samples at given rates: every epoch has as many draws as samples, and no more luck than must be.

Systematic sampling: a sample with rate 2.3 is drawn two or three times in every epoch, one with 0.25 in every fourth on
average, and neighbours take turns. A pure function of (seed, step), so that nothing has to be remembered.

Legend: N samples to draw from, B samples of one step.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.data.blocks import Blocks
from fmdeploy.training.sampler import Index, draw, windowed_order

RATE_STREAM = 0x7261


class MixtureSampler:
    """See `training.sampler.Sampler`.

    Args:
        rate_N: How often each sample is drawn an epoch, mean 1.
        batch: B.
        seed: Of the orders.
        chosen: Numbers (N,) of the samples that the rates are of; None: 0 .. N - 1.
        blocks: Where the samples lie, when they do not fit in memory: draws then stay in windows.
    """

    def __init__(
        self, rate_N: Array, batch: int, seed: int, chosen: Index | None = None, blocks: Blocks | None = None
    ) -> None:
        self._rate_N, self._batch, self._seed, self._blocks = np.asarray(rate_N, np.float64), batch, seed, blocks
        self._chosen = np.arange(len(rate_N)) if chosen is None else np.asarray(chosen)
        self._order = lru_cache(maxsize=2)(self._drawn)

    @property
    def count(self) -> int:
        """Draws of an epoch: as many as there are samples."""
        return len(self._rate_N)

    def index(self, step: int) -> Index:
        """Sample numbers (B,) of one step."""
        return draw(self._order, self.count, self._batch, step)

    def _drawn(self, epoch: int) -> Index:
        rng = np.random.default_rng((self._seed, epoch, RATE_STREAM))
        multiset = np.repeat(self._chosen, systematic_counts(self._rate_N, rng))
        if self._blocks is None or self._blocks.fit:
            return np.asarray(rng.permutation(multiset), np.int64)
        return windowed_order(self._blocks, multiset, rng)


def systematic_counts(rate_N: Array, rng: np.random.Generator) -> Index:
    """How often each sample is drawn (N,): the floor or the ceiling of its rate, N draws in all.

    One random offset u: counts are the whole numbers that the running sum of the rates, shifted by u, passes
    (Madow 1949).
    """
    ends_N = np.cumsum(rate_N) * (len(rate_N) / np.sum(rate_N))
    ends_N[-1] = len(rate_N)
    passed_N = np.floor(ends_N + rng.random()).astype(np.int64)
    return np.asarray(np.diff(passed_N, prepend=0))

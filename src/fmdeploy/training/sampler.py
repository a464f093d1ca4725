"""Which samples a step sees: a pure function of seed and step, so that nothing has to be remembered.

Every epoch shows every sample once. Samples that fit in memory are permuted as a whole; of a larger set the shards are
permuted, a few of them at a time make a window, and samples are permuted within their window: training then reads a
bounded number of shards again and again, and each shard once an epoch.

Legend: B samples of one step over all processes and parts, N samples to draw from, K blocks (what a shard holds).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fmdeploy.data.blocks import Blocks
from fmdeploy.errors import ConfigError
from fmdeploy.task import Samples
from fmdeploy.training.distributed import world

Index = npt.NDArray[np.int64]
MIRROR_STREAM = 0x6D69
WINDOW_STREAM = 0x7769
WINDOWS = 2  # of the memory for decoded blocks, one window takes half: a run may draw from two samplers at once


class Sampler(Protocol):
    """Says which samples a step sees."""

    @property
    def count(self) -> int:
        """Samples to draw from."""

    def index(self, step: int) -> Index:
        """Sample numbers (B,) of one step, over all processes and parts; a function of `step` alone."""


@dataclass(frozen=True)
class UniformSampler:
    """Every epoch is a new order of all samples.

    Attributes:
        count: Samples to draw from.
        batch: Samples a step.
        seed: Of the orders.
        chosen: Their numbers (count,); None: 0 .. count - 1.
    """

    count: int
    batch: int
    seed: int
    chosen: Index | None = None

    def index(self, step: int) -> Index:
        """See `Sampler`."""
        drawn = step_index(self.count, self.batch, seed=self.seed, step=step)
        return drawn if self.chosen is None else self.chosen[drawn]


class WindowedSampler:
    """Every epoch is a new order of blocks, of the windows they fall into, and of the samples within each window.

    Args:
        blocks: Where the samples lie.
        batch: Samples a step.
        seed: Of the orders.
        chosen: Numbers (N,) of the samples to draw from; None: all.
    """

    def __init__(self, blocks: Blocks, batch: int, seed: int, chosen: Index | None = None) -> None:
        self._blocks, self._batch, self._seed = blocks, batch, seed
        self._chosen = np.arange(len(blocks.block_N)) if chosen is None else np.asarray(chosen)
        self._order = lru_cache(maxsize=2)(self._shuffled)  # of this epoch and, across its end, the next

    @property
    def count(self) -> int:
        """Samples to draw from."""
        return len(self._chosen)

    def index(self, step: int) -> Index:
        """See `Sampler`."""
        return draw(self._order, self.count, self._batch, step)

    def _shuffled(self, epoch: int) -> Index:
        """The order (N,) of one epoch."""
        return windowed_order(self._blocks, self._chosen, np.random.default_rng((self._seed, epoch, WINDOW_STREAM)))


def windowed_order(blocks: Blocks, numbers: Index, rng: np.random.Generator) -> Index:
    """`numbers` (N,), some perhaps more than once, in a random order that stays in few blocks for a while."""
    sorted_N = numbers[np.argsort(blocks.block_N[numbers], kind="stable")]
    used_K, first_K = np.unique(blocks.block_N[sorted_N], return_index=True)
    members = np.split(sorted_N, first_K[1:])
    windows = _windows(blocks.bytes_K[used_K], blocks.budget // WINDOWS, rng)
    return np.concatenate([rng.permutation(np.concatenate([members[k] for k in window])) for window in windows])


def _windows(bytes_K: npt.NDArray[Any], room: int, rng: np.random.Generator) -> list[list[int]]:
    """Blocks in random order, cut where one more would not fit into `room` bytes."""
    windows: list[list[int]] = []
    left = 0
    for block in rng.permutation(len(bytes_K)):
        need = int(bytes_K[block])
        if not windows or need > left:
            windows.append([])
            left = room
        windows[-1].append(int(block))
        left -= need
    return windows


def make_sampler(samples: Samples, batch: int, seed: int, index: Index | None = None) -> Sampler:
    """The order for `samples`: uniform where they say nothing of blocks or all blocks fit in memory, else windowed.

    Args:
        samples: With an attribute `blocks` where they are decoded as they are asked for.
        batch: Samples a step.
        seed: Of the order.
        index: Numbers of the samples that may be drawn; None: all.
    """
    blocks: Blocks | None = getattr(samples, "blocks", None)
    if blocks is None or blocks.fit:
        return UniformSampler(len(samples) if index is None else len(index), batch, seed, index)
    return WindowedSampler(blocks, batch, seed, index)


def step_index(count: int, batch: int, *, seed: int, step: int) -> Index:
    """Sample numbers (batch,) of one step: every epoch is a new order of all `count` samples."""
    return draw(lambda epoch: _order(count, seed, epoch), count, batch, step)


def draw(order: Callable[[int], Index], count: int, batch: int, step: int) -> Index:
    """The numbers (batch,) at the places of one step in the row of all epochs' orders."""
    position = step * batch + np.arange(batch)
    epochs = position // count
    index = np.empty(batch, np.int64)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        index[inside] = order(int(epoch))[position[inside] % count]
    return index


@lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int) -> Index:
    return np.random.default_rng((seed, epoch)).permutation(count).astype(np.int64)


def mirror_mask(batch: int, *, seed: int, step: int) -> npt.NDArray[np.bool_]:
    """Which of the samples (batch,) of a step are mirrored: each with probability 1/2."""
    return np.random.default_rng((seed, step, MIRROR_STREAM)).random(batch) < 0.5


def my_part(values: npt.NDArray[Any], part: int, accumulation: int) -> npt.NDArray[Any]:
    """The slice of a step's (B, ...) that this process computes in part `part` of `accumulation`.

    Raises:
        ConfigError: B does not divide by processes times parts.
    """
    rank, size = world()
    pieces = size * accumulation
    if len(values) % pieces:
        raise ConfigError(
            "the batch cannot be cut into equal parts", where="batch", found=len(values),
            expected=f"a multiple of {size} processes x {accumulation} parts",
        )
    length = len(values) // pieces
    start = (part * size + rank) * length
    return values[start : start + length]

"""Which samples a step sees: a pure function of seed and step, so that nothing has to be remembered.

Legend: B samples of one step over all processes and parts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fmdeploy.errors import ConfigError
from fmdeploy.training.distributed import world

Index = npt.NDArray[np.int64]
MIRROR_STREAM = 0x6D69


def step_index(count: int, batch: int, *, seed: int, step: int) -> Index:
    """Sample numbers (batch,) of one step: every epoch is a new order of all `count` samples."""
    position = step * batch + np.arange(batch)
    epochs = position // count
    index = np.empty(batch, np.int64)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        index[inside] = _order(count, seed, int(epoch))[position[inside] % count]
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

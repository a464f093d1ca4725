"""Which tokens are hidden: random places (MAE), or blocks to be predicted from what lies around them (I-JEPA).

Masks are drawn in numpy, one generator a sample, and have equal counts in every sample: a batch stays rectangular, and
what a sample hides depends neither on its neighbours nor on the number of processes.

Legend: B samples, N tokens of the whole grid, S tokens a side, K visible ones, M hidden ones, T blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.random import Generator

from fmdeploy.errors import ConfigError

Index = npt.NDArray[np.int64]
LONGEST = 2.0  # sides of a block differ by at most this factor


class Blocks(NamedTuple):
    """What JEPA sees and what it predicts."""

    context_BK: Index
    targets_BTM: Index


def random_parts(num_tokens: int, counts: Sequence[int], rngs: Sequence[Generator]) -> list[Index]:
    """Disjoint random sets of token numbers, each (B, count) in ascending order (arXiv:2111.06377, section 3).

    Args:
        num_tokens: N; the counts sum up to at most this.
        counts: Size of each set.
        rngs: One generator a sample.
    """
    order_BN = np.stack([rng.permutation(num_tokens) for rng in rngs]).astype(np.int64)
    ends = np.cumsum([0, *counts])
    return [np.sort(order_BN[:, first:last], axis=1) for first, last in pairwise(ends)]


def block_shapes(side: int, share: float) -> list[tuple[int, int]]:
    """Rows and columns of blocks that all cover the same number of tokens, the nearest possible one to `share`.

    I-JEPA draws area and aspect ratio freely and cuts a batch's masks to the shortest; equal areas need no cutting.
    """
    areas: dict[int, list[tuple[int, int]]] = {}
    for rows in range(1, side + 1):
        for columns in range(1, side + 1):
            if max(rows, columns) <= LONGEST * min(rows, columns):
                areas.setdefault(rows * columns, []).append((rows, columns))
    return areas[min(areas, key=lambda area: (abs(area - share * side * side), area))]


def context_size(side: int, *, blocks: int, share: float, context: float) -> int:
    """Tokens K that every sample sees: the share `context`, or what `blocks` disjoint blocks would leave, if less.

    Raises:
        ConfigError: the blocks may leave nothing.
    """
    rows, columns = block_shapes(side, share)[0]
    left = side * side - blocks * rows * columns
    if left < 1:
        raise ConfigError("the target blocks may cover the whole picture", where="jepa",
                          expected=f"fewer than {side * side} tokens", found=f"{blocks} x {rows * columns}",
                          fix="Lower jepa.blocks or jepa.share")
    return max(1, min(left, round(context * side * side)))


def block_masks(side: int, *, blocks: int, share: float, context: float, rngs: Sequence[Generator]) -> Blocks:
    """Target blocks, which may overlap, and a context outside all of them (arXiv:2301.08243, section 3).

    Args:
        side: S.
        blocks: T, of equal area.
        share: Of all tokens, in one block.
        context: Of all tokens, at most, in the context: a random choice of what no block covers.
        rngs: One generator a sample.
    """
    size = context_size(side, blocks=blocks, share=share, context=context)
    shapes = block_shapes(side, share)
    drawn = [_sample(side, shapes, blocks, size, rng) for rng in rngs]
    return Blocks(np.stack([context_K for context_K, _ in drawn]), np.stack([targets_TM for _, targets_TM in drawn]))


def _sample(side: int, shapes: list[tuple[int, int]], blocks: int, size: int, rng: Generator) -> tuple[Index, Index]:
    number_SS = np.arange(side * side).reshape(side, side)
    targets = []
    for _ in range(blocks):
        rows, columns = shapes[rng.integers(len(shapes))]
        top, left = rng.integers(side - rows + 1), rng.integers(side - columns + 1)
        targets.append(number_SS[top : top + rows, left : left + columns].ravel())
    free = np.setdiff1d(number_SS, np.concatenate(targets))
    return np.sort(rng.permutation(free)[:size]).astype(np.int64), np.stack(targets).astype(np.int64)


def arrays_of(**index: Index) -> dict[str, npt.NDArray[Any]]:
    """Contiguous index arrays under their names, as a kind of a batch."""
    return {name: np.ascontiguousarray(value) for name, value in index.items()}

"""Which tokens are hidden: random places (MAE), or blocks of them (I-JEPA).

Masks are drawn in numpy, one generator a sample, and have equal counts in every sample: a batch stays rectangular, and
what a sample hides depends neither on its neighbours nor on the number of processes.

Legend: B samples, N tokens of the whole grid, S tokens a side, M tokens of a block, T blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.random import Generator

Index = npt.NDArray[np.int64]
LONGEST = 2.0  # sides of a block differ by at most this factor


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


def random_blocks(side: int, *, blocks: int, share: float, rngs: Sequence[Generator]) -> Index:
    """Token numbers (B, T, M) of rectangles, which may overlap (arXiv:2301.08243, section 3).

    Args:
        side: S.
        blocks: T, of equal area.
        share: Of all tokens, in one block.
        rngs: One generator a sample.
    """
    shapes = block_shapes(side, share)
    return np.stack([[_block(side, shapes, rng) for _ in range(blocks)] for rng in rngs])


def _block(side: int, shapes: list[tuple[int, int]], rng: Generator) -> Index:
    rows, columns = shapes[rng.integers(len(shapes))]
    top, left = rng.integers(side - rows + 1), rng.integers(side - columns + 1)
    number_SS = np.arange(side * side, dtype=np.int64).reshape(side, side)
    return number_SS[top : top + rows, left : left + columns].ravel()


def arrays_of(**index: Index) -> dict[str, npt.NDArray[Any]]:
    """Contiguous index arrays under their names, as a kind of a batch."""
    return {name: np.ascontiguousarray(value) for name, value in index.items()}

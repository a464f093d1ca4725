"""Rows of a split that are decoded a block at a time, as they are asked for, and kept within a budget of memory.

A block is what one shard holds of the split. A split that fits the budget is decoded once and stays; of a larger one
the blocks that were used last stay, so whoever reads it should stay in a few blocks for a while (see
`training.sampler.WindowedSampler`).

Legend: N samples, R rows of the split (frames), K blocks.
"""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, overload

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.data.sequence import SequenceInfo

BUDGET_BYTES = 64 * 2**20
"""Decoded blocks of one split that are kept. Whether a split fits decides the order of training: no option."""
KEPT_BLOCKS = 3
"""This many stay however large they are: a run may draw from two orders, and one of them goes to its next block."""


@dataclass(frozen=True)
class Blocks:
    """How samples lie in blocks, for whoever chooses an order.

    Attributes:
        block_N: Block of each sample, int32 (N,).
        bytes_K: Decoded size of each block, int64 (K,).
        budget: Bytes that are kept.
    """

    block_N: Array
    bytes_K: Array
    budget: int

    @property
    def fit(self) -> bool:
        """Whether all of them can be kept: then any order is as good as another."""
        return int(self.bytes_K.sum()) <= self.budget


class BlockRows:
    """Named arrays of R rows, of which only some blocks are in memory; may be read from several threads.

    Args:
        first_K: Number of each block's first row.
        layout: Name → dtype and shape of one row.
        bytes_K: Decoded size of each block.
        load: Number of a block → its arrays, each (rows of the block, ...).
        budget: Bytes to keep, and KEPT_BLOCKS in any case. None: BUDGET_BYTES.
    """

    def __init__(
        self, first_K: Array, layout: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], bytes_K: Array,
        load: Callable[[int], Arrays], budget: int | None = None,
    ) -> None:
        self.first_K, self.layout, self.bytes_K, self._load = first_K, dict(layout), bytes_K, load
        self.budget = BUDGET_BYTES if budget is None else budget
        self._kept: OrderedDict[int, Arrays] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, name: str, rows: Array) -> Array:
        """Rows of the array `name`: (*rows.shape, ...), as a copy."""
        flat = np.asarray(rows).ravel()
        dtype, shape = self.layout[name]
        found = np.empty((len(flat), *shape), dtype)
        block = self.block_of(flat)
        for number in np.unique(block):
            mine = np.flatnonzero(block == number)
            found[mine] = self._block(int(number))[name][flat[mine] - self.first_K[number]]
        return found.reshape(*np.shape(rows), *shape)

    def block_of(self, rows: Array) -> Array:
        """The block of each row."""
        return np.asarray(np.searchsorted(self.first_K, rows, side="right") - 1)

    def blocks(self, rows_N: Array) -> Blocks:
        """How samples whose present rows are `rows_N` lie in the blocks."""
        return Blocks(self.block_of(rows_N).astype(np.int32), self.bytes_K, self.budget)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the blocks in memory."""
        return sum(array.nbytes for arrays in list(self._kept.values()) for array in arrays.values())

    def _block(self, number: int) -> Arrays:
        with self._lock:  # a second thread that wants the same block waits for it, instead of decoding it as well
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
            need = int(self.bytes_K[number])
            while len(self._kept) >= KEPT_BLOCKS and int(self.bytes_K[list(self._kept)].sum()) + need > self.budget:
                self._kept.popitem(last=False)  # before the next one is decoded: the peak counts
            self._kept[number] = {name: _apart(array) for name, array in self._load(number).items()}
            return self._kept[number]


def _apart(array: Array) -> Array:
    """A copy in pages of its own, given back the moment it is dropped.

    On malloc's heap blocks that come and go lie between the buffers of a network, and the largest of those find no
    room any more: the heap grew by a third over 100,000 samples (`benchmarks/flat_memory.py`).
    """
    pages = mmap.mmap(-1, max(1, array.nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    found = np.frombuffer(pages, array.dtype, count=array.size).reshape(array.shape)
    np.copyto(found, array)
    return found


class Rows:
    """One array of a `BlockRows`, indexed like the numpy array that it stands for."""

    def __init__(self, whole: BlockRows, name: str) -> None:
        self._whole, self._name = whole, name

    def __getitem__(self, rows: Array) -> Array:
        return self._whole.take(self._name, rows)


class Names(Sequence[str]):
    """Names `<sequence>/<frame>` of N samples, made when they are asked for: 100,000 strings take eight megabytes.

    Args:
        sequences: Names of the sequences.
        sequence_N: Number of each sample's sequence.
        frame_N: Its frame within that.
    """

    def __init__(self, sequences: Sequence[str], sequence_N: Array, frame_N: Array) -> None:
        self._sequences, self._sequence_N, self._frame_N = tuple(sequences), sequence_N, frame_N

    def __len__(self) -> int:
        return len(self._frame_N)

    @overload
    def __getitem__(self, key: int) -> str: ...

    @overload
    def __getitem__(self, key: slice) -> tuple[str, ...]: ...

    def __getitem__(self, key: int | slice) -> str | tuple[str, ...]:
        """One name, or a tuple of them."""
        if isinstance(key, slice):
            return tuple(self[k] for k in range(len(self))[key])
        return f"{self._sequences[self._sequence_N[key]]}/{self._frame_N[key]}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(
            mine == theirs for mine, theirs in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Names({len(self)})"


class Labels(Mapping[str, Array]):
    """Label arrays (N,) by axis, kept as small numbers and spelled out when they are asked for.

    Args:
        axes: Axis → label of each distinct value, and the number (N,) of each sample's value.
    """

    def __init__(self, axes: Mapping[str, tuple[Array, Array]]) -> None:
        self._axes = {axis: (names, codes.astype(np.min_scalar_type(len(names))))
                      for axis, (names, codes) in axes.items()}

    @classmethod
    def of(cls, labels: Mapping[str, Array]) -> Labels:
        """From plain arrays."""
        found = {axis: np.unique(values, return_inverse=True) for axis, values in labels.items()}
        return cls({axis: (names, codes.ravel()) for axis, (names, codes) in found.items()})

    def __getitem__(self, axis: str) -> Array:
        names, codes = self._axes[axis]
        return np.asarray(names[codes])

    def __iter__(self) -> Iterator[str]:
        return iter(self._axes)

    def __len__(self) -> int:
        return len(self._axes)


def runs(sequences: Sequence[SequenceInfo]) -> list[list[SequenceInfo]]:
    """Neighbours that lie in one shard: the sequences of each block."""
    return [list(group) for _, group in groupby(sequences, key=lambda sequence: sequence.shard)]

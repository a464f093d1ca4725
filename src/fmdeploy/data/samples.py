"""Samples of datasets that were made from plain arrays: every frame is one sample."""

# N samples, B batch, H rows, W columns

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.data.blocks import BlockRows, Blocks, Names, Rows, runs
from fmdeploy.data.format import Dataset, Layout
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.errors import DataError

SLICE_PREFIX = "slice_"


@dataclass(frozen=True)
class ArraySamples:
    """All samples of one split; see `task.Samples`. Arrays lie in memory or are decoded as they are asked for."""

    ids: Sequence[str]
    groups: Array
    inputs: Mapping[str, Any]
    """Name → array (N, ...), or `Rows` of one."""
    targets: Mapping[str, Any]
    slices: Mapping[str, Array] = field(default_factory=dict)
    blocks: Blocks | None = None
    """How the samples lie in shards, where they are not all in memory."""

    @classmethod
    def of(cls, data: Dataset, split: str, input_names: Sequence[str], *, budget: int | None = None) -> ArraySamples:
        """The samples of `split`, of which `budget` bytes are kept in memory; a split that fits is read at once.

        Arrays called `slice_<name>` become slices, other non-inputs become targets.

        Raises:
            DataError: the dataset lacks an input, or its sequences hold different arrays.
        """
        sequences = data.split(split)
        layout, slices = _glance(data, sequences, input_names)
        rows = _rows(data, sequences, layout, budget)
        blocks = rows.blocks(np.arange(sum(s.frames for s in sequences)))
        numbers = {name: k for k, name in enumerate(dict.fromkeys(s.group for s in sequences))}
        count = [s.frames for s in sequences]
        arrays = {name: rows.take(name, np.arange(len(blocks.block_N))) if blocks.fit else Rows(rows, name)
                  for name in layout}
        return cls(
            ids=Names([s.id for s in sequences], np.repeat(np.arange(len(count), dtype=np.int32), count),
                      np.concatenate([np.arange(frames, dtype=np.int32) for frames in count])),
            groups=np.repeat(np.array([numbers[s.group] for s in sequences], np.int64), count),
            inputs={name: arrays[name] for name in input_names},
            targets={name: array for name, array in arrays.items() if name not in input_names},
            slices=slices, blocks=None if blocks.fit else blocks,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, index: Array) -> tuple[Arrays, Arrays]:
        """Inputs and targets of the samples `index` (B,)."""
        return {n: a[index] for n, a in self.inputs.items()}, {n: a[index] for n, a in self.targets.items()}


def _glance(
    data: Dataset, sequences: Sequence[SequenceInfo], input_names: Sequence[str]
) -> tuple[Layout, Arrays]:
    """Dtype and shape of one row of every array that is no slice, and the slices."""
    layout: Layout = {}
    slices: dict[str, list[Array]] = {}
    for sequence, found, arrays in data.glances(sequences, lambda name: name.startswith(SLICE_PREFIX)):
        rows = {name: (dtype, shape[1:]) for name, (dtype, shape) in found.items()}
        if missing := [name for name in input_names if name not in rows]:
            raise DataError(f"has no array {missing[0]!r}", where=data.artifact.root, found=", ".join(rows))
        plain = {name: row for name, row in rows.items() if name not in arrays}
        if layout and plain != layout:
            raise DataError(f"sequence {sequence.id} holds other arrays than the first one", where=data.artifact.root,
                            expected=_spelled(layout), found=_spelled(plain))
        layout = plain
        for name, array in arrays.items():
            slices.setdefault(name.removeprefix(SLICE_PREFIX), []).append(array)
    return layout, {name: np.concatenate(parts) for name, parts in slices.items()}


def _rows(data: Dataset, sequences: Sequence[SequenceInfo], layout: Layout, budget: int | None) -> BlockRows:
    members = runs(sequences)
    frames_K = np.array([sum(sequence.frames for sequence in block) for block in members])
    per_frame = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in layout.values())
    return BlockRows(np.cumsum(frames_K) - frames_K, layout, frames_K * per_frame,
                     lambda number: data.joined(members[number], list(layout)), budget)


def _spelled(layout: Layout) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (dtype, shape) in sorted(layout.items()))


def first_image(values: Arrays) -> Array:
    """A grey picture (H, W, 3) uint8 of the first array that has two spatial axes, scaled to its own range."""
    for value in values.values():
        if value.ndim >= 2 and min(value.shape[-2:]) > 1:
            plane = np.asarray(value, np.float32).reshape(-1, *value.shape[-2:])[0]
            low, high = float(plane.min()), float(plane.max())
            grey = ((plane - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
    return np.zeros((8, 8, 3), np.uint8)

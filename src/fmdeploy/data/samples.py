"""Samples of datasets that were made from plain arrays: every frame is one sample."""

# N samples, B batch, H rows, W columns

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.data.format import Dataset
from fmdeploy.errors import DataError

SLICE_PREFIX = "slice_"


@dataclass(frozen=True)
class ArraySamples:
    """All samples of one split in memory; see `task.Samples`."""

    ids: tuple[str, ...]
    groups: Array
    inputs: Arrays
    targets: Arrays
    slices: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Dataset, split: str, input_names: Sequence[str]) -> ArraySamples:
        """Load `split`. Arrays called `slice_<name>` become slices, other non-inputs become targets.

        Raises:
            DataError: the dataset lacks an input.
        """
        sequences = data.split(split)
        parts = [data.arrays(sequence) for sequence in sequences]
        if missing := [name for name in input_names if name not in parts[0]]:
            raise DataError(f"has no array {missing[0]!r}", where=data.artifact.root, found=", ".join(parts[0]))
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        numbers = {name: k for k, name in enumerate(dict.fromkeys(s.group for s in sequences))}
        return cls(
            ids=tuple(f"{s.id}/{t}" for s in sequences for t in range(s.frames)),
            groups=np.concatenate([np.full(s.frames, numbers[s.group], np.int64) for s in sequences]),
            inputs={name: joined[name] for name in input_names},
            targets={n: a for n, a in joined.items() if n not in input_names and not n.startswith(SLICE_PREFIX)},
            slices={n.removeprefix(SLICE_PREFIX): a for n, a in joined.items() if n.startswith(SLICE_PREFIX)},
        )

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, index: Array) -> tuple[Arrays, Arrays]:
        """Inputs and targets of the samples `index` (B,)."""
        return {n: a[index] for n, a in self.inputs.items()}, {n: a[index] for n, a in self.targets.items()}


def first_image(values: Arrays) -> Array:
    """A grey picture (H, W, 3) uint8 of the first array that has two spatial axes, scaled to its own range."""
    for value in values.values():
        if value.ndim >= 2 and min(value.shape[-2:]) > 1:
            plane = np.asarray(value, np.float32).reshape(-1, *value.shape[-2:])[0]
            low, high = float(plane.min()), float(plane.max())
            grey = ((plane - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
    return np.zeros((8, 8, 3), np.uint8)

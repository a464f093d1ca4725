"""Some samples of a split, where all of them would take too long."""

# N samples, B batch

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fmdeploy.data.blocks import Blocks
from fmdeploy.task import Array, Arrays, Samples

ASKED_BY_NUMBER = ("frames", "occupancy", "motion")


@dataclass(frozen=True)
class Subset:
    """Some of the samples of a split; see `task.Samples`."""

    whole: Samples
    index: Array

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of the chosen samples."""
        return tuple(self.whole.ids[k] for k in self.index)

    @property
    def groups(self) -> Array:
        """(N,) int64 clusters of the chosen samples."""
        return np.asarray(self.whole.groups)[self.index]

    @property
    def slices(self) -> dict[str, Array]:
        """Slicings of the chosen samples."""
        return {name: np.asarray(labels)[self.index] for name, labels in self.whole.slices.items()}

    @property
    def blocks(self) -> Blocks | None:
        """Where the chosen samples lie, for an order that stays in few shards; None where the whole does not say."""
        found: Blocks | None = getattr(self.whole, "blocks", None)
        return None if found is None else Blocks(found.block_N[self.index], found.bytes_K, found.budget)

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, index: Array) -> tuple[Arrays, Arrays]:
        """Inputs and targets of the chosen samples `index` (B,)."""
        return self.whole.batch(self.index[index])

    def __getattr__(self, name: str) -> Any:
        """Other ways to ask the whole by sample number (`frames`, `occupancy`, `motion`), with the chosen numbers."""
        ask = getattr(self.whole, name) if name in ASKED_BY_NUMBER else None
        if ask is None:
            raise AttributeError(name)
        return lambda index, *args: ask(self.index[index], *args)


def subset(samples: Samples, count: int) -> Subset:
    """Choose up to `count` samples, evenly spaced, so that every recording is heard."""
    return Subset(samples, np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(np.int64)))

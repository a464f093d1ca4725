"""Samples that stand in for a dataset's where only shapes count: zeros, as the task's specification says they look.

Legend: B samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.task import Samples, Task
from fmdeploy.tasks.bev_occupancy_samples import GRID, SENSOR_PLANES

COUNT = 64


def stand_in(task: Task) -> Samples:
    """Samples of `task` without data; those of a task with a past also have other frames."""
    return BlankFrames(task) if task.frames > 1 else Blank(task)


class Blank:
    """Inputs of zeros and no targets: only a dataset knows what labels look like.

    Args:
        task: Whose inputs these are.
    """

    def __init__(self, task: Task) -> None:
        self._io = task.io
        self.ids: Sequence[str] = [f"blank/{number}" for number in range(COUNT)]
        self.groups: Array = np.arange(COUNT)
        self.slices: Mapping[str, Array] = {}

    def __len__(self) -> int:
        return COUNT

    def batch(self, index: Array) -> tuple[Arrays, Arrays]:
        """See `Samples.batch`."""
        return {spec.name: np.zeros((len(index), *spec.shape), spec.dtype) for spec in self._io.inputs}, {}


class BlankFrames(Blank):
    """With the frames around each sample, as `tasks.bev_occupancy_samples.BevSamples` has them."""

    def frames(self, index: Array, offsets: Sequence[int]) -> Array:
        """Sensor planes uint8 (B, len(offsets), planes, cells, cells)."""
        return np.zeros((len(index), len(offsets), len(SENSOR_PLANES), GRID, GRID), np.uint8)

    def motion(self, index: Array, offsets: Sequence[int]) -> Array:
        """The ego's motion, float32 (B, len(offsets), 3)."""
        return np.zeros((len(index), len(offsets), 3), np.float32)

"""Batches of labelled samples, mirrored at random."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fmdeploy.task import Arrays, Samples, Task
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.loop import Batch
from fmdeploy.training.sampler import Sampler, make_sampler, mirror_mask, my_part


@dataclass(frozen=True)
class SupervisedBatches:
    """One process's share of a step: `inputs` and `targets` of its samples.

    Attributes:
        task: Knows how to mirror.
        samples: The training samples.
        config: Batch size, parts, seed and whether to mirror.
    """

    task: Task
    samples: Samples
    config: TrainingConfig

    @cached_property
    def sampler(self) -> Sampler:
        """The order of the samples."""
        return make_sampler(self.samples, self.config.batch, self.config.seed)

    def __call__(self, step: int, part: int) -> Batch:
        """Part `part` of step `step`; equal arguments give equal bytes."""
        config = self.config
        index = self.sampler.index(step)
        mask = mirror_mask(config.batch, seed=config.seed, step=step)
        inputs, targets = self.samples.batch(my_part(index, part, config.accumulation))
        batch: Batch = {"inputs": inputs, "targets": targets}
        return mirrored(self.task, batch, my_part(mask, part, config.accumulation)) if config.mirror else batch


def mirrored(task: Task, batch: Batch, mask: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Batch:
    """Every kind of array of `batch` with the masked samples mirrored, contiguous."""
    return {kind: _contiguous(task.flip(arrays, mask)) for kind, arrays in batch.items()}


def _contiguous(arrays: Arrays) -> Arrays:
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

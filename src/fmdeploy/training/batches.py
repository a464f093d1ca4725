"""Batches of labelled samples, drawn from a mixture and mirrored at random.

Legend: B samples of one process's share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fmdeploy.task import Arrays, Task
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.loop import Batch
from fmdeploy.training.mixture.draws import Draws
from fmdeploy.training.mixture.options import Mixture
from fmdeploy.training.sampler import Index, Sampler, mirror_mask, my_part


@dataclass(frozen=True)
class SupervisedBatches:
    """One process's share of a step: `inputs` and `targets` of its samples.

    Attributes:
        task: Knows how to mirror.
        mixture: The training samples, and how often each is seen.
        config: Batch size, parts, seed and whether to mirror.
        index: Numbers of the samples that may be used; None: all.
    """

    task: Task
    mixture: Mixture
    config: TrainingConfig
    index: Index | None = None

    @cached_property
    def draws(self) -> Draws:
        """What is drawn from."""
        return self.mixture.draws(self.index)

    @cached_property
    def sampler(self) -> Sampler:
        """The order of the samples."""
        return self.draws.sampler(self.config.batch, self.config.seed)

    def __call__(self, step: int, part: int) -> Batch:
        """Part `part` of step `step`; equal arguments give equal bytes."""
        return self.mirrored(self.read(self.chosen(step, part)), step, part)

    def chosen(self, step: int, part: int) -> Index:
        """Sample numbers (B,) of one share."""
        return my_part(self.sampler.index(step), part, self.config.accumulation)

    def read(self, chosen: Index) -> Batch:
        """`inputs` and `targets` of the samples `chosen` (B,), as they are."""
        inputs, targets = self.draws.batch(chosen)
        return {"inputs": inputs, "targets": targets}

    def mirrored(self, batch: Batch, step: int, part: int) -> Batch:
        """Every kind of array of a share with the samples that are mirrored in this step, contiguous."""
        if not self.config.mirror:
            return batch
        mask = my_part(mirror_mask(self.config.batch, seed=self.config.seed, step=step), part, self.config.accumulation)
        return {kind: contiguous(self.task.flip(arrays, mask)) for kind, arrays in batch.items()}


def contiguous(arrays: Arrays) -> Arrays:
    """The same numbers, laid out as the device wants them."""
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

"""Batches of distillation: some samples with labels in front, then samples that only the teacher labels.

Legend: B samples of one process's share, L of them labelled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fmdeploy.distill.config import DistillConfig
from fmdeploy.errors import ConfigError
from fmdeploy.task import Samples, Task
from fmdeploy.teacher.features import CacheReader
from fmdeploy.training.batches import mirrored
from fmdeploy.training.distributed import world
from fmdeploy.training.loop import Batch
from fmdeploy.training.sampler import Index, mirror_mask, my_part, step_index

LABELLED_STREAM = 1 << 20  # a seed of its own, so that the two orders are independent


@dataclass(frozen=True)
class DistillBatches:
    """One process's share of a step.

    Kinds of arrays: `inputs` (B, ...), `targets` (L, ...), and from a cache `teacher` (B, ...); for a live teacher
    instead `canonical`, the inputs before mirroring, and `mirror` with the mask (B,).

    Attributes:
        task: Knows how to mirror.
        samples: The training samples.
        labelled: Numbers of those with labels.
        config: Batch size, shares, seed.
        cache: The teacher's answers, if they are cached.
        live: Whether a teacher answers during training.
    """

    task: Task
    samples: Samples
    labelled: Index
    config: DistillConfig
    cache: CacheReader | None = None
    live: bool = False

    def __post_init__(self) -> None:
        pieces = world()[1] * self.config.accumulation
        if self.num_labelled % pieces:
            raise ConfigError("the labelled samples of a batch cannot be cut into equal parts", where="labelled_share",
                              expected=f"a multiple of {pieces} samples (processes x parts)", found=self.num_labelled,
                              fix="Change --labelled-share or --batch")

    @property
    def num_labelled(self) -> int:
        """Labelled samples in a whole step's batch."""
        if self.cache is None and not self.live:
            return self.config.batch
        return max(1, round(self.config.labelled_share * self.config.batch)) if len(self.labelled) else 0

    def __call__(self, step: int, part: int) -> Batch:
        """Part `part` of step `step`; equal arguments give equal bytes."""
        index, labels = self._index(step, part)
        mask = self._mine(mirror_mask(self.config.batch, seed=self.config.seed, step=step), part)
        mask = mask if self.config.mirror else np.zeros_like(mask)
        inputs, targets = self.samples.batch(index)
        batch: Batch = {"inputs": inputs, "targets": targets}
        if self.cache is not None:
            batch["teacher"] = self.cache.batch(index)
        result = mirrored(self.task, batch, mask)
        result["targets"] = {name: array[:labels] for name, array in result["targets"].items()}
        if self.live:
            result |= {"canonical": inputs, "mirror": {"mask": mask}}
        return result

    def _index(self, step: int, part: int) -> tuple[Index, int]:
        """Sample numbers, and how many of the first ones are labelled."""
        count, seed = self.num_labelled, self.config.seed
        pieces = []
        if count:
            drawn = step_index(len(self.labelled), count, seed=seed + LABELLED_STREAM, step=step)
            pieces.append(my_part(self.labelled[drawn], part, self.config.accumulation))
        if count < self.config.batch:
            drawn = step_index(len(self.samples), self.config.batch - count, seed=seed, step=step)
            pieces.append(my_part(drawn, part, self.config.accumulation))
        return np.concatenate(pieces), len(pieces[0]) if count else 0

    def _mine(self, mask: npt.NDArray[Any], part: int) -> npt.NDArray[Any]:
        """The mask in the order of `_index`: the labelled samples' share, then the others'."""
        count = self.num_labelled
        pieces = [mask[:count], mask[count:]]
        return np.concatenate([my_part(piece, part, self.config.accumulation) for piece in pieces if len(piece)])

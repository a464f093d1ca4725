"""Batches of distillation: some samples with labels in front, then samples that only the teachers label.

Legend: B samples of one process's share, L of them labelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fmdeploy.distill.augment import Augmentation, mine, pick
from fmdeploy.distill.config import DistillConfig
from fmdeploy.distill.resolution import reduced
from fmdeploy.errors import ConfigError
from fmdeploy.task import Samples, Task
from fmdeploy.teacher.features import CacheReader
from fmdeploy.training.batches import contiguous
from fmdeploy.training.distributed import world
from fmdeploy.training.loop import Batch
from fmdeploy.training.mixture.draws import Draws
from fmdeploy.training.mixture.options import Mixture
from fmdeploy.training.sampler import Index, Sampler, my_part

LABELLED_STREAM = 1 << 20  # a seed of its own, so that the two orders are independent


@dataclass(frozen=True)
class DistillBatches:
    """One process's share of a step.

    Kinds of arrays: `inputs` (B, ...), `targets` (L, ...), and from a cache `teacher0` (B, ...), `teacher1` and so on;
    for live teachers instead `canonical`, the inputs before they are moved, and `geometry` with `flip` (B,) and
    perhaps `box` (B, 4). In the first steps of a progressive run all but `canonical` is small, and `resolution` holds
    the factor.

    Attributes:
        task: Knows how to move maps.
        mixture: The training samples, and how often each is seen.
        labelled: Numbers of those with labels.
        config: Batch size, shares, seed.
        caches: The answers of each teacher, if they are cached.
        live: Whether teachers answer during training.
        augmentation: How samples are moved.
    """

    task: Task
    mixture: Mixture
    labelled: Index
    config: DistillConfig
    caches: Sequence[CacheReader] = ()
    live: bool = False
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(flip=False))

    def __post_init__(self) -> None:
        pieces = world()[1] * self.config.accumulation
        if self.num_labelled % pieces:
            raise ConfigError("the labelled samples of a batch cannot be cut into equal parts", where="labelled_share",
                              expected=f"a multiple of {pieces} samples (processes x parts)", found=self.num_labelled,
                              fix="Change --labelled-share or --batch")

    @property
    def samples(self) -> Samples:
        """The training samples."""
        return self.mixture.samples

    @cached_property
    def samplers(self) -> tuple[Sampler | None, Sampler | None]:
        """The orders of the labelled samples and of all samples; None where a batch has none of them."""
        count, config = self.num_labelled, self.config
        labelled = self.supervised.sampler(count, config.seed + LABELLED_STREAM) if count else None
        rest = self.mixture.draws().sampler(config.batch - count, config.seed) if count < config.batch else None
        return labelled, rest

    @cached_property
    def supervised(self) -> Draws:
        """What is drawn for its labels."""
        return self.mixture.draws(self.labelled if self.num_labelled else None)

    @property
    def num_labelled(self) -> int:
        """Labelled samples in a whole step's batch."""
        if not self.caches and not self.live:
            return self.config.batch
        if not len(self.labelled) or not self.config.weights().labels:
            return 0
        return max(1, round(self.config.labelled_share * self.config.batch))

    def factor(self, step: int) -> int:
        """By how much the maps of a step are reduced; 1: not."""
        return self.config.progressive_factor if step < self.config.progressive * self.config.steps else 1

    def __call__(self, step: int, part: int) -> Batch:
        """Part `part` of step `step`; equal arguments give equal bytes."""
        config = self.config
        index, labels = self._index(step, part)
        geometry = mine(self.augmentation.draw(config.batch, seed=config.seed, step=step), self.num_labelled, part,
                        config.accumulation)
        inputs, targets = self.supervised.batch(index)
        batch: Batch = {"inputs": inputs, "targets": {name: array[:labels] for name, array in targets.items()}}
        batch |= {f"teacher{number}": cache.batch(index) for number, cache in enumerate(self.caches)}
        seen = {"targets": pick(geometry, slice(labels))}
        result = {kind: contiguous(self.task.transform(arrays, seen.get(kind, geometry)))
                  for kind, arrays in batch.items()}
        factor = self.factor(step)
        if factor > 1:
            result = {kind: reduced(arrays, factor, mean=kind == "inputs") for kind, arrays in result.items()}
        if self.live:
            moved = {"flip": geometry.flip} | ({} if geometry.box_B4 is None else {"box": geometry.box_B4})
            result |= {"canonical": inputs, "geometry": moved}
            result |= {"resolution": {"factor": np.array(factor)}} if factor > 1 else {}
        return result

    def _index(self, step: int, part: int) -> tuple[Index, int]:
        """Sample numbers, and how many of the first ones are labelled."""
        orders = [sampler for sampler in self.samplers if sampler is not None]
        pieces = [my_part(sampler.index(step), part, self.config.accumulation) for sampler in orders]
        return np.concatenate(pieces), len(pieces[0]) if self.num_labelled else 0

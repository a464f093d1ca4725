"""What the training loop sees of an adaptation: the adapted teacher with its loss, and batches of two domains.

Legend: B samples of one process's share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from fmdeploy.models import input_list, named_outputs
from fmdeploy.task import Arrays, Samples, Task
from fmdeploy.training.batches import mirrored
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.loop import Batch, Losses, Tensors
from fmdeploy.training.sampler import Index, mirror_mask, my_part, step_index

REPLAY_STREAM = 0x7265


class Adaptation(nn.Module):
    """The adapted teacher; its forward takes a batch and returns the task's loss.

    Args:
        task: Of the teacher.
        teacher: Adapted; trained in place.
    """

    def __init__(self, task: Task, teacher: nn.Module) -> None:
        super().__init__()
        self.task, self.teacher = task, teacher

    def train(self, mode: bool = True) -> Adaptation:
        """Training mode, but BatchNorm keeps the statistics of the frozen teacher: an adapter does not hold any."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, batch: Tensors) -> Losses:
        """Part `hard`: `Task.loss`."""
        outputs = named_outputs(self.task.io, self.teacher(*input_list(self.task.io, batch["inputs"])))
        # This runs inside autocast: sums over the cells of a batch must not be taken of bf16 numbers.
        return {"hard": self.task.loss({name: x.float() for name, x in outputs.items()}, batch["targets"])}


@dataclass(frozen=True)
class TwoDomains:
    """One process's share of a step: samples of the new domain and, evenly among them, of the old one.

    Attributes:
        task: Knows how to mirror.
        samples: Of the new domain.
        config: Batch size, parts, seed and whether to mirror.
        index: Numbers of the samples whose labels are used; None: all.
        replay: Samples of the old domain.
        share: Of each batch that is old.
    """

    task: Task
    samples: Samples
    config: TrainingConfig
    index: Index | None = None
    replay: Samples | None = None
    share: float = 0.0

    def __call__(self, step: int, part: int) -> Batch:
        """Part `part` of step `step`; equal arguments give equal bytes."""
        config = self.config
        old = my_part(old_places(config.batch, self.share), part, config.accumulation)
        drawn = my_part(self._numbers(step), part, config.accumulation)
        mask = my_part(mirror_mask(config.batch, seed=config.seed, step=step), part, config.accumulation)
        inputs, targets = self.samples.batch(drawn[~old])
        if old.any() and self.replay is not None:
            theirs = self.replay.batch(drawn[old])
            inputs, targets = _woven(inputs, theirs[0], old), _woven(targets, theirs[1], old)
        batch: Batch = {"inputs": inputs, "targets": targets}
        return mirrored(self.task, batch, mask) if config.mirror else batch

    def _numbers(self, step: int) -> Index:
        """Sample number at each place of a step's batch, in the domain that the place belongs to."""
        config, old = self.config, old_places(self.config.batch, self.share)
        numbers = np.empty(config.batch, np.int64)
        count = len(self.samples) if self.index is None else len(self.index)
        fresh = step_index(count, int((~old).sum()), seed=config.seed, step=step)
        numbers[~old] = fresh if self.index is None else self.index[fresh]
        if old.any() and self.replay is not None:
            seed = config.seed + (REPLAY_STREAM << 32)
            numbers[old] = step_index(len(self.replay), int(old.sum()), seed=seed, step=step)
        return numbers


def old_places(batch: int, share: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which places (batch,) of a step are of the old domain: `share` of them, evenly spaced, never all."""
    place = np.arange(batch)
    return np.asarray(np.floor((place + 1) * share + 1e-9) > np.floor(place * share + 1e-9))


def _woven(new: Arrays, old: Arrays, mask: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Arrays:
    """One batch in which the masked places are old."""
    found: Arrays = {}
    for name, array in new.items():
        found[name] = np.empty((len(mask), *array.shape[1:]), array.dtype)
        found[name][~mask], found[name][mask] = array, old[name]
    return found

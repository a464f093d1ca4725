"""A teacher and its objectives as the one module that the training loop sees, and the batches they need.

Legend: B samples of one process's share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from torch import Tensor, nn

from fmdeploy.errors import ConfigError
from fmdeploy.models.tokens import backbone_of
from fmdeploy.task import Samples, Task
from fmdeploy.teacher.objectives.base import Objective
from fmdeploy.teacher.objectives.registry import Choice
from fmdeploy.training.batches import SupervisedBatches
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.loop import Batch, Losses, StoppedError, Tensors
from fmdeploy.training.mixture.options import Mixture
from fmdeploy.training.sampler import Index, my_part

OBJECTIVE_STREAM = 0x6F62
LABELLED = "labelled."
"""In front of the kinds of arrays of samples that were drawn for their labels, where they are drawn apart."""


class Pretraining(nn.Module):
    """Teacher and objectives; its forward takes a batch and returns the weighted parts of the loss.

    Only what some objective trains wants a gradient: without labels the heads keep their first weights.

    Args:
        task: Of the teacher.
        teacher: Trained in place.
        choices: What to train it with.
        steps: Of the whole run.

    Raises:
        ConfigError: an objective needs a backbone that this teacher lacks.
    """

    def __init__(self, task: Task, teacher: nn.Module, choices: Sequence[Choice], *, steps: int) -> None:
        super().__init__()
        self.teacher = teacher
        self.weights = {choice.kind.name: choice.weight for choice in choices}
        self.objectives = nn.ModuleDict(
            {choice.kind.name: choice.kind(task, teacher, choice.config, steps=steps) for choice in choices}
        )
        self.trains_heads = any(choice.kind.needs_labels for choice in choices)
        if not self.trains_heads:
            backbone = backbone_of(teacher, where=f"task {task.name}")
            mine = {id(parameter) for parameter in backbone.parameters()}
            self.frozen = [p for p in teacher.parameters() if id(p) not in mine and p.requires_grad]
        else:
            self.frozen = []
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    def each(self) -> Mapping[str, Objective]:
        """The objectives by name."""
        return {name: module for name, module in self.objectives.items() if isinstance(module, Objective)}

    def forward(self, batch: Tensors) -> Losses:
        """Parts of the loss by name, with the objective's name in front where there are several."""
        found: Losses = {}
        for name, objective in self.each().items():
            for part, value in objective.losses(self.teacher, _seen_by(objective, batch)).items():
                found |= self._named(name, {part: value.float() * self.weights[name]})
        return found

    def after_step(self, step: int) -> dict[str, Tensor]:
        """Let every objective do what follows an optimiser step; what it wants to see in the log."""
        found: dict[str, Tensor] = {}
        for name, objective in self.each().items():
            try:
                found |= self._named(name, objective.after_step(self.teacher, step))
            except StoppedError as error:
                error.seen = found | self._named(name, error.seen)
                raise
        return found

    def resting(self, step: int) -> list[nn.Parameter]:
        """Parameters that no objective trains in a step."""
        named = [set(objective.resting(self.teacher, step)) for objective in self.each().values()]
        if not any(named):
            return []
        shared = set(self.teacher.parameters())
        return [parameter for parameter in self.parameters() if any(parameter in mine for mine in named)
                and (parameter not in shared or all(parameter in mine for mine in named))]

    def _named(self, name: str, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key if len(self.weights) == 1 else f"{name}.{key}": value for key, value in seen.items()}

    def release(self) -> None:
        """Let the heads want gradients again."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)


def _seen_by(objective: Objective, batch: Tensors) -> Tensors:
    """What an objective is given of a batch: the labelled samples where it reads labels and they are drawn apart."""
    labelled = {kind.removeprefix(LABELLED): found for kind, found in batch.items() if kind.startswith(LABELLED)}
    return labelled if labelled and objective.needs_labels else batch


def with_arrays(
    batch: Batch, objectives: Sequence[Objective], samples: Samples, index: Index, rngs: Sequence[Sequence[Generator]]
) -> tuple[Batch, Batch]:
    """A batch with the arrays that objectives add, and apart from it those that mirroring must leave alone.

    Args:
        batch: What is read of the samples anyway.
        objectives: Asked for more arrays.
        samples: That these are of.
        index: Numbers (B,) of the samples in the batch.
        rngs: For each objective one generator a sample.

    Raises:
        ConfigError: two objectives make the same kind of array.
    """
    found, fixed = dict(batch), Batch()
    for objective, mine in zip(objectives, rngs, strict=True):
        for kind, arrays in objective.arrays(samples, index, mine).items():
            if kind in found or kind in fixed:
                raise ConfigError("two objectives make the same kind of array", where=objective.name, found=kind)
            (fixed if kind in objective.unmirrored else found)[kind] = dict(arrays)
    return found, fixed


@dataclass(frozen=True)
class PretrainingBatches(SupervisedBatches):
    """One process's share of a step: `inputs`, `targets`, and what the objectives add.

    Attributes:
        objectives: Asked for more arrays.
    """

    objectives: Sequence[Objective] = ()

    def __call__(self, step: int, part: int) -> Batch:
        """Part `part` of step `step`; equal arguments give equal bytes."""
        chosen = self.chosen(step, part)
        places = my_part(np.arange(self.config.batch), part, self.config.accumulation)
        key = (self.config.seed, step, OBJECTIVE_STREAM)
        rngs = [[np.random.default_rng((*key, number, int(place))) for place in places]
                for number in range(len(self.objectives))]
        batch, fixed = with_arrays(self.read(chosen), self.objectives, self.mixture.samples, chosen, rngs)
        return {**self.mirrored(batch, step, part), **fixed}


@dataclass(frozen=True)
class RationedBatches:
    """One process's share of a step where only some samples have labels: two batches of equal size.

    One is drawn from all samples, for objectives that read no labels, and holds none. The other is drawn from the
    labelled samples, as a run without those objectives would draw it; its kinds begin with `LABELLED`.

    Attributes:
        every: The former.
        labelled: The latter.
    """

    every: PretrainingBatches
    labelled: PretrainingBatches

    def __call__(self, step: int, part: int) -> Batch:
        """Part `part` of step `step`; equal arguments give equal bytes."""
        found = {kind: arrays for kind, arrays in self.every(step, part).items() if kind != "targets"}
        return found | {LABELLED + kind: arrays for kind, arrays in self.labelled(step, part).items()}


def make_batches(
    task: Task, mixture: Mixture, config: TrainingConfig, index: Index | None, objectives: Sequence[Objective]
) -> PretrainingBatches | RationedBatches:
    """The batches of a run.

    Args:
        task: Knows how to mirror.
        mixture: The training samples, and how often each is seen.
        config: Batch size, parts, seed and whether to mirror.
        index: Numbers of the samples whose labels may be used; None: all.
        objectives: Those of the run.
    """
    readers = [objective for objective in objectives if objective.needs_labels]
    others = [objective for objective in objectives if not objective.needs_labels]
    if index is None or not readers or not others:
        return PretrainingBatches(task, mixture, config, index, objectives)
    return RationedBatches(PretrainingBatches(task, mixture, config, None, others),
                           PretrainingBatches(task, mixture, config, index, readers))

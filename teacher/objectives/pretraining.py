"""A teacher and its objectives as the one module that the training loop sees, and the batches they need.

Legend: B samples of one process's share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor, nn

from fmdeploy.errors import ConfigError
from fmdeploy.models.tokens import backbone_of
from fmdeploy.task import Task
from fmdeploy.teacher.objectives.base import Objective
from fmdeploy.teacher.objectives.registry import Choice
from fmdeploy.training.batches import mirrored
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.loop import Batch, Losses, Tensors
from fmdeploy.training.mixture.options import WEIGHT, Mixture
from fmdeploy.training.sampler import Index, Sampler, mirror_mask, my_part

OBJECTIVE_STREAM = 0x6F62


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
            for part, value in objective.losses(self.teacher, batch).items():
                key = part if len(self.weights) == 1 else f"{name}.{part}"
                found[key] = value.float() * self.weights[name]
        return found

    def after_step(self, step: int) -> dict[str, Tensor]:
        """Let every objective do what follows an optimiser step; what it wants to see in the log."""
        found: dict[str, Tensor] = {}
        for name, objective in self.each().items():
            for key, value in objective.after_step(self.teacher, step).items():
                found[key if len(self.weights) == 1 else f"{name}.{key}"] = value
        return found

    def release(self) -> None:
        """Let the heads want gradients again."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class PretrainingBatches:
    """One process's share of a step: `inputs`, `targets`, and what the objectives add.

    Attributes:
        task: Knows how to mirror.
        mixture: The training samples, and how often each is seen.
        config: Batch size, parts, seed and whether to mirror.
        objectives: Asked for more arrays.
        index: Numbers of the samples that may be used; None: all.
    """

    task: Task
    mixture: Mixture
    config: TrainingConfig
    objectives: Sequence[Objective]
    index: Index | None = None

    @cached_property
    def sampler(self) -> Sampler:
        """The order of the samples."""
        return self.mixture.sampler(self.config.batch, self.config.seed, self.index)

    def __call__(self, step: int, part: int) -> Batch:
        """Part `part` of step `step`; equal arguments give equal bytes."""
        config = self.config
        chosen = my_part(self.sampler.index(step), part, config.accumulation)
        mask = my_part(mirror_mask(config.batch, seed=config.seed, step=step), part, config.accumulation)
        inputs, targets = self.mixture.samples.batch(chosen)
        if (weights := self.mixture.weights(chosen, self.index)) is not None:
            targets = {**targets, WEIGHT: weights}
        batch: Batch = {"inputs": inputs, "targets": targets}
        fixed: Batch = {}
        for objective, rngs in self._draws(step, part):
            for kind, arrays in objective.arrays(self.mixture.samples, chosen, rngs).items():
                target = fixed if kind in objective.unmirrored else batch
                if kind in batch or kind in fixed:
                    raise ConfigError("two objectives make the same kind of array", where=objective.name, found=kind)
                target[kind] = dict(arrays)
        return {**(mirrored(self.task, batch, mask) if config.mirror else batch), **fixed}

    def _draws(self, step: int, part: int) -> list[tuple[Objective, list[np.random.Generator]]]:
        """For each objective one generator a sample of this share."""
        places = my_part(np.arange(self.config.batch), part, self.config.accumulation)
        key = (self.config.seed, step, OBJECTIVE_STREAM)
        return [
            (objective, [np.random.default_rng((*key, number, int(place))) for place in places])
            for number, objective in enumerate(self.objectives)
        ]

"""A teacher and its objectives as the one module that the training loop sees, and the batches they need.

Legend: B samples of one process's share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from fmdeploy.errors import ConfigError
from fmdeploy.models.tokens import backbone_of
from fmdeploy.task import Task
from fmdeploy.teacher.objectives.base import Objective
from fmdeploy.teacher.objectives.registry import Choice
from fmdeploy.training.batches import SupervisedBatches
from fmdeploy.training.loop import Batch, Losses, StoppedError, Tensors
from fmdeploy.training.sampler import my_part

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

    def _named(self, name: str, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key if len(self.weights) == 1 else f"{name}.{key}": value for key, value in seen.items()}

    def release(self) -> None:
        """Let the heads want gradients again."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)


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
        batch, fixed = self.read(chosen), Batch()
        for objective, rngs in self._draws(step, part):
            for kind, arrays in objective.arrays(self.mixture.samples, chosen, rngs).items():
                target = fixed if kind in objective.unmirrored else batch
                if kind in batch or kind in fixed:
                    raise ConfigError("two objectives make the same kind of array", where=objective.name, found=kind)
                target[kind] = dict(arrays)
        return {**self.mirrored(batch, step, part), **fixed}

    def _draws(self, step: int, part: int) -> list[tuple[Objective, list[np.random.Generator]]]:
        """For each objective one generator a sample of this share."""
        places = my_part(np.arange(self.config.batch), part, self.config.accumulation)
        key = (self.config.seed, step, OBJECTIVE_STREAM)
        return [
            (objective, [np.random.default_rng((*key, number, int(place))) for place in places])
            for number, objective in enumerate(self.objectives)
        ]

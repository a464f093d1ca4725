"""Supervised multi-task training: the task's own loss against labels."""

from __future__ import annotations

from torch import nn

from fmdeploy.models import input_list, named_outputs
from fmdeploy.teacher.objectives.base import Objective
from fmdeploy.training.loop import Losses, Tensors


class Supervised(Objective):
    """Part `hard`: `Task.loss` of backbone and heads."""

    name = "supervised"
    needs_labels = True

    def losses(self, teacher: nn.Module, batch: Tensors) -> Losses:
        """See `Objective.losses`."""
        outputs = named_outputs(self.task.io, teacher(*input_list(self.task.io, batch["inputs"])))
        # This runs inside autocast: sums over the cells of a batch must not be taken of bf16 numbers.
        return {"hard": self.task.loss({name: x.float() for name, x in outputs.items()}, batch["targets"])}

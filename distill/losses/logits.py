"""The task's own loss against the teacher's logits."""

from __future__ import annotations

from torch import Tensor

from fmdeploy.distill.losses.base import OutputLoss
from fmdeploy.task import Task


class Logits(OutputLoss):
    """`Task.distillation_loss`: what the task's author found best."""

    name = "logits"

    def __call__(self, task: Task, outputs: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        """See `OutputLoss`."""
        return task.distillation_loss(outputs, teacher)

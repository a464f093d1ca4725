"""What the training loop sees of an adaptation: the adapted teacher with its loss."""

from __future__ import annotations

from torch import nn

from fmdeploy.models import input_list, named_outputs
from fmdeploy.task import Task
from fmdeploy.training.loop import Losses, Tensors


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

"""Knowledge distillation as it began: divergence of softened probabilities.

Legend: B batch, C classes; `...` any shape.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from fmdeploy.distill.losses.base import LossConfig, OutputLoss
from fmdeploy.errors import ConfigError
from fmdeploy.task import Task
from fmdeploy.training.losses import bernoulli_kl, kl_divergence


class KdConfig(LossConfig):
    """How soft, and how much each output counts."""

    temperature: float = Field(default=2.0, gt=0)
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default={}, description=(
        "output → weight; 1 where it is not named"))


class Kd(OutputLoss):
    """KL(teacher || student) at a temperature T, times T² (arXiv:1503.02531, section 2), summed over the outputs.

    Softmax over the classes of an exclusive output; one Bernoulli variable an element of the others.
    """

    name = "kd"
    Config = KdConfig
    config: KdConfig

    def check(self, task: Task) -> None:
        """Refuse weights of outputs that are nowhere, and weights that leave nothing."""
        names = [spec.name for spec in task.io.outputs]
        if unknown := sorted(set(self.config.weights) - set(names)):
            raise ConfigError("the task has no such output", where="loss kd.weights", expected=", ".join(names),
                              found=unknown[0])
        if not any(self.config.weights.get(name, 1.0) for name in names):
            raise ConfigError("no output has weight", where="loss kd.weights", fix="Leave kd out of --loss")

    def __call__(self, task: Task, outputs: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        """See `OutputLoss`."""
        heat, exclusive = self.config.temperature, task.exclusive()
        total = next(iter(outputs.values())).new_zeros(())
        for name, logits in outputs.items():
            if not (weight := self.config.weights.get(name, 1.0)):
                continue
            if name in exclusive:
                loss = kl_divergence(_classes_last(logits), _classes_last(teacher[name]), temperature=heat)
            else:
                loss = bernoulli_kl(logits / heat, teacher[name] / heat) * heat**2
            total = total + weight * loss
        return total


def _classes_last(logits: Tensor) -> Tensor:
    """(B, C, ...) as (B, ..., C)."""
    return logits.movedim(1, -1)

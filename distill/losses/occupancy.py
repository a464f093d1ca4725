"""Distillation of dense occupancy that the empty cells do not dominate.

Legend: B batch, C planes (horizons), H W rows and columns.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import max_pool2d, softplus

from fmdeploy.distill.losses.base import LossConfig, OutputLoss
from fmdeploy.errors import ConfigError
from fmdeploy.task import Task
from fmdeploy.training.distributed import sum_over_ranks


class OccupancyConfig(LossConfig):
    """What makes a cell count."""

    near: float = Field(default=1.0, ge=0, description="weight of the teacher's largest probability within the reach")
    boundary: float = Field(default=1.0, ge=0, description="weight of its spread within one cell: edges of objects")
    disagreement: float = Field(default=1.0, ge=0, description="weight of |student - teacher| in probability")
    floor: float = Field(default=0.02, gt=0, description="what every cell counts")
    reach: int = Field(default=2, ge=0, description="cells around an occupied one that are near")


class Occupancy(OutputLoss):
    """KL of every cell's Bernoulli variable, weighted, over the sum of weights: one number a plane, mean over planes.

    With the teacher's probability p and the student's q, in the manner of the foreground-weighted losses of arXiv:
    1708.02002 and 2111.11837: w = floor + near max_reach(p) + boundary (max_1(p) - min_1(p)) + disagreement |p - q|.
    Each horizon is a plane of its own, so that a late, sparse one counts as much as the present. The weights carry no
    gradient; sums go over the batch of all processes.
    """

    name = "occupancy"
    Config = OccupancyConfig
    config: OccupancyConfig

    def check(self, task: Task) -> None:
        """Refuse a task without dense yes-or-no outputs."""
        exclusive = task.exclusive()
        if not any(len(spec.shape) == 3 and spec.name not in exclusive for spec in task.io.outputs):
            raise ConfigError("compares yes-or-no outputs (C, H, W), and this task has none", where="loss occupancy",
                              found=", ".join(f"{spec.name} {list(spec.shape)}" for spec in task.io.outputs),
                              fix="Use logits or kd")

    def __call__(self, task: Task, outputs: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        """See `OutputLoss`; only yes-or-no outputs (B, C, H, W) take part."""
        exclusive = task.exclusive()
        losses = [self.plane_loss(logits, teacher[name]) for name, logits in outputs.items()
                  if logits.ndim == 4 and name not in exclusive]
        return torch.stack(losses).mean()

    def plane_loss(self, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """The loss of one dense output; both are logits."""
        student_BCHW, teacher_BCHW = student_BCHW.float(), teacher_BCHW.float()
        chance_BCHW = torch.sigmoid(teacher_BCHW)
        weight_BCHW = self.weights(torch.sigmoid(student_BCHW.detach()), chance_BCHW)
        slope_BCHW = (student_BCHW - teacher_BCHW) * chance_BCHW
        kl_BCHW = softplus(student_BCHW) - softplus(teacher_BCHW) - slope_BCHW  # see training.losses.bernoulli_kl
        total_2C = torch.stack([(weight_BCHW * kl_BCHW).sum((0, 2, 3)), weight_BCHW.sum((0, 2, 3))])
        total_2C = sum_over_ranks(total_2C)
        return (total_2C[0] / total_2C[1]).mean()

    def weights(self, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Of each cell, from both probabilities."""
        config = self.config
        near_BCHW = _largest(teacher_BCHW, config.reach)
        edge_BCHW = _largest(teacher_BCHW, 1) + _largest(-teacher_BCHW, 1)
        apart_BCHW = (student_BCHW - teacher_BCHW).abs()
        return (config.floor + config.near * near_BCHW + config.boundary * edge_BCHW
                + config.disagreement * apart_BCHW)


def _largest(map_BCHW: Tensor, reach: int) -> Tensor:
    return max_pool2d(map_BCHW, 2 * reach + 1, stride=1, padding=reach)

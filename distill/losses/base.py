"""What a loss of distillation is: against the teacher's answers, or between a map of the student's and one of its.

Legend: B batch, C channels of the student's map, D of the teacher's, h w rows and columns of the teacher's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fmdeploy.distill.statistics import Statistics
from fmdeploy.task import Task


class LossConfig(BaseModel):
    """Base of a loss's options, given as `--set NAME.KEY=VALUE`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Loss:
    """Base of both kinds; every one is exactly zero where student and teacher agree.

    Attributes:
        name: As in `--loss NAME=WEIGHT`.
        Config: Its options.
    """

    name: ClassVar[str]
    Config: ClassVar[type[LossConfig]] = LossConfig

    def __init__(self, config: LossConfig) -> None:
        self.config = config


class OutputLoss(Loss, ABC):
    """A loss between the student's outputs and a teacher's, or the average of several teachers'."""

    def check(self, task: Task) -> None:
        """Refuse a task whose outputs this loss cannot compare.

        Raises:
            ConfigError: with what it would need.
        """

    @abstractmethod
    def __call__(self, task: Task, outputs: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        """Scalar loss of logits (B, ...) by name; sums over the batch go over all processes."""


class MapLoss(Loss, ABC):
    """A loss between a map of the student and a map of a teacher with the same rows and columns.

    Attributes:
        projected: It wants the student's map in the teacher's channels, through the projector.
        needs_statistics: It wants the statistics of the teacher's map.
    """

    projected: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, student: Tensor, teacher_BDhw: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Scalar loss of a map (B, D, h, w), or (B, C, h, w) where it is not `projected`, to (B, D, h, w)."""

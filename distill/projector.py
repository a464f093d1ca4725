"""From the student's map to the teacher's: a bridge for the loss, thrown away after training.

Legend: B batch, C channels of the student's map, D of the teacher's, h w rows and columns of the teacher's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy.iospec import IOSpec
from fmdeploy.models import example_inputs
from fmdeploy.teacher.view import Tap


class Projector(nn.Module):
    """Average the student's map down to the teacher's grid, then a 1 x 1 convolution to its channels."""

    def __init__(self, num_in: int, shape_Dhw: tuple[int, ...]) -> None:
        super().__init__()
        self.grid = (shape_Dhw[1], shape_Dhw[2])
        self.lift = nn.Conv2d(num_in, shape_Dhw[0], 1)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, h, w)."""
        projected_BDhw: Tensor = self.lift(_pooled(map_BCHW, self.grid))
        return projected_BDhw


def _pooled(map_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean over equal windows: the plain kernel where they are all alike, which is far faster than the adaptive one."""
    height, width = map_BCHW.shape[2:]
    if height % grid[0] or width % grid[1]:
        return F.adaptive_avg_pool2d(map_BCHW, grid)
    window = (height // grid[0], width // grid[1])
    return map_BCHW if window == (1, 1) else F.avg_pool2d(map_BCHW, window)


class Pupil(nn.Module):
    """A student with a projector on one of its layers: returns the student's outputs and the projected map.

    The student is untouched; only while this object lives does a hook listen to its layer.

    Args:
        student: The network that is kept.
        layer: The student's module whose map is projected.
        shape_Dhw: Shape of the teacher's map.
        io: To size the projector by one forward pass.
    """

    def __init__(self, student: nn.Module, layer: str, shape_Dhw: tuple[int, ...], io: IOSpec) -> None:
        super().__init__()
        self.student = student
        self.tap = Tap(student, layer)
        was_training = student.training
        with torch.no_grad():
            student.eval()(*example_inputs(io))
        student.train(was_training)
        self.projector = Projector(self.tap.take().shape[1], shape_Dhw)

    def forward(self, *inputs: Tensor) -> tuple[Any, Tensor]:
        """The student's own outputs, and the projected map (B, D, h, w)."""
        raw = self.student(*inputs)
        return raw, self.projector(self.tap.take())

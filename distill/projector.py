"""From the student's maps to the teachers': bridges for the loss, thrown away after training.

Legend: B batch, C channels of the student's map, D of a teacher's, h w rows and columns of the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy.iospec import IOSpec
from fmdeploy.models import example_inputs
from fmdeploy.teacher.view import FEATURE, Tap

LOG_VARIANCE = "log_variance"


@dataclass(frozen=True)
class Match:
    """One map of one teacher and the student's layer that is compared with it.

    Attributes:
        teacher: Number of the teacher.
        layer: Its layer.
        student_layer: The student's.
        shape_Dhw: Shape of the teacher's map.
        share: How much that teacher counts.
    """

    teacher: int
    layer: str
    student_layer: str
    shape_Dhw: tuple[int, ...]
    share: float = 1.0

    @property
    def answer(self) -> str:
        """Name of the map among the teacher's answers."""
        return FEATURE + self.layer


class Pooled(nn.Module):
    """Averages the student's map down to the teacher's grid.

    Where the sides divide, windows are fixed by the ratio at full resolution, so that reduced inputs give a reduced
    map; and the plain kernel is far faster than the adaptive one.
    """

    def __init__(self, size_HW: tuple[int, int], grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        divides = not (size_HW[0] % grid[0] or size_HW[1] % grid[1])
        self.window = (size_HW[0] // grid[0], size_HW[1] // grid[1]) if divides else None

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, h, w)."""
        if self.window is None:
            return F.adaptive_avg_pool2d(map_BCHW, self.grid)
        return map_BCHW if self.window == (1, 1) else F.avg_pool2d(map_BCHW, self.window)


class Pupil(nn.Module):
    """A student with a bridge for each map to compare: returns its outputs and the maps by name.

    `map.<n>` is the student's map on the grid of match n, `projected.<n>` the same in the teacher's channels (one 1 x 1
    convolution for each teacher and layer, as in AM-RADIO, arXiv:2312.06709, section 3.2), and `log_variance` the
    trained uncertainties of the losses. The student is untouched; only while this object lives do hooks listen to it.

    Args:
        student: The network that is kept.
        matches: What is compared.
        io: To size the bridges by one forward pass.
        projected: Whether any loss wants the teacher's channels.
        uncertainties: How many losses weigh themselves.
    """

    def __init__(
        self, student: nn.Module, matches: Sequence[Match], io: IOSpec, *, projected: bool = True,
        uncertainties: int = 0,
    ) -> None:
        super().__init__()
        self.student, self.matches = student, tuple(matches)
        self.taps = {layer: Tap(student, layer) for layer in dict.fromkeys(m.student_layer for m in matches)}
        self._run_once(io)
        shapes = {layer: tap.take().shape for layer, tap in self.taps.items()}
        self.pools, self.projectors = nn.ModuleList(), nn.ModuleList()
        for match in self.matches:
            channels, height, width = shapes[match.student_layer][1:]
            self.pools.append(Pooled((height, width), (match.shape_Dhw[1], match.shape_Dhw[2])))
            if projected:
                self.projectors.append(nn.Conv2d(channels, match.shape_Dhw[0], 1))
        self.log_variance = nn.Parameter(torch.zeros(uncertainties)) if uncertainties else None

    def _run_once(self, io: IOSpec) -> None:
        was_training = self.student.training
        with torch.no_grad():
            self.student.eval()(*example_inputs(io))
        self.student.train(was_training)

    def forward(self, *inputs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """The student's own outputs, and what the losses read beside them."""
        raw, found = self.student(*inputs), {}
        taken = {layer: tap.take() for layer, tap in self.taps.items()}
        for number, (match, pool) in enumerate(zip(self.matches, self.pools, strict=True)):
            found[f"map.{number}"] = pool(taken[match.student_layer])
            if self.projectors:
                found[f"projected.{number}"] = self.projectors[number](found[f"map.{number}"])
        if self.log_variance is not None:
            found[LOG_VARIANCE] = self.log_variance * 1.0
        return raw, found

    def remove(self) -> None:
        """Take the hooks off the student."""
        for tap in self.taps.values():
            tap.remove()


def freeze_unreached(student: nn.Module, layers: Sequence[str], io: IOSpec) -> list[nn.Parameter]:
    """Let the parameters that no map of `layers` depends on want no gradient, and return them: heads, mostly.

    A parameter without a gradient would stop DistributedDataParallel.
    """
    taps = [Tap(student, layer) for layer in layers]
    was_training = student.training
    student.eval()(*example_inputs(io))
    student.train(was_training)
    wanted = [parameter for parameter in student.parameters() if parameter.requires_grad]
    total = torch.stack([tap.take().float().sum() for tap in taps]).sum()
    for tap in taps:
        tap.remove()
    reached = torch.autograd.grad(total, wanted, allow_unused=True)
    frozen = [parameter for parameter, gradient in zip(wanted, reached, strict=True) if gradient is None]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen

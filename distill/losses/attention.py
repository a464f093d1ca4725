"""Where a network looks, whatever its channels mean.

Legend: B batch, C channels, N positions.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from fmdeploy.distill.losses.base import MapLoss
from fmdeploy.distill.statistics import Statistics


class Attention(MapLoss):
    """Attention transfer (arXiv:1612.03928, equation 2): squared distance of the unit attention maps, a sample.

    The attention at a position is the sum of squares over the channels, so no projector is needed.
    """

    name = "attention"
    projected = False

    def __call__(self, student: Tensor, teacher_BDhw: Tensor, statistics: Statistics | None = None) -> Tensor:
        """See `MapLoss`."""
        return (_attention(student) - _attention(teacher_BDhw)).square().sum(1).mean()


def _attention(map_BChw: Tensor) -> Tensor:
    """Unit vectors (B, N)."""
    return normalize(map_BChw.float().square().mean(1).flatten(1), dim=1)

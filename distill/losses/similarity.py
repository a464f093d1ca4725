"""Which places of a scene are alike.

Legend: B batch, C channels, N positions (tokens).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from fmdeploy.distill.losses.base import MapLoss
from fmdeploy.distill.statistics import Statistics


class Similarity(MapLoss):
    """Squared error of the tokens' cosine matrices (pair-wise distillation, arXiv:1903.04197, equations 1 and 2)."""

    name = "similarity"
    projected = False

    def __call__(self, student: Tensor, teacher_BDhw: Tensor, statistics: Statistics | None = None) -> Tensor:
        """See `MapLoss`."""
        return (_gram(student) - _gram(teacher_BDhw)).square().mean()


def _gram(map_BChw: Tensor) -> Tensor:
    """(B, N, N) cosines of every two positions."""
    tokens_BCN = normalize(map_BChw.float().flatten(2), dim=1)
    return tokens_BCN.mT @ tokens_BCN

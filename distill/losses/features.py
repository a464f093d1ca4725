"""Smooth L1 between normalised features.

Legend: B batch, D channels, h w rows and columns.
"""

from __future__ import annotations

from torch import Tensor

from fmdeploy.distill.losses.base import MapLoss
from fmdeploy.distill.statistics import Statistics
from fmdeploy.training.losses import feature_distance


class Features(MapLoss):
    """Smooth L1 of the maps after a layer norm at each position (the normalised target of arXiv:2205.14141)."""

    name = "features"

    def __call__(self, student: Tensor, teacher_BDhw: Tensor, statistics: Statistics | None = None) -> Tensor:
        """See `MapLoss`."""
        return feature_distance(student, teacher_BDhw, axis=1)

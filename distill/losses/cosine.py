"""The angle between feature vectors.

Legend: B batch, D channels, h w rows and columns.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from fmdeploy.distill.losses.base import MapLoss
from fmdeploy.distill.statistics import Statistics


class Cosine(MapLoss):
    """One minus the cosine at each position, mean over positions (the summary loss of AM-RADIO, arXiv:2312.06709).

    Written as half the squared distance of the unit vectors, which is the same number and exactly zero at equality.
    """

    name = "cosine"

    def __call__(self, student: Tensor, teacher_BDhw: Tensor, statistics: Statistics | None = None) -> Tensor:
        """See `MapLoss`."""
        difference_BDhw = normalize(student.float(), dim=1) - normalize(teacher_BDhw.float(), dim=1)
        return 0.5 * difference_BDhw.square().sum(1).mean()

"""How samples lie to each other: distances and angles within the batch of all processes.

An embedding is a sample's whole map, flattened; student and teacher may have different channels.

Legend: B samples of the whole step, E length of an embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, smooth_l1_loss

from fmdeploy.distill.losses.base import MapLoss
from fmdeploy.distill.statistics import Statistics
from fmdeploy.training.distributed import sum_over_ranks, world

TINY = 1e-12


class Distance(MapLoss):
    """Huber loss of pairwise distances over their mean (RKD-D, arXiv:1904.05068, equations 3 to 5)."""

    name = "distance"
    projected = False

    def __call__(self, student: Tensor, teacher_BDhw: Tensor, statistics: Statistics | None = None) -> Tensor:
        """See `MapLoss`."""
        return smooth_l1_loss(_distances(_gathered(student)), _distances(_gathered(teacher_BDhw)))


class Angle(MapLoss):
    """Huber loss of the cosines at each triplet's corner (RKD-A, arXiv:1904.05068, equations 6 and 7)."""

    name = "angle"
    projected = False

    def __call__(self, student: Tensor, teacher_BDhw: Tensor, statistics: Statistics | None = None) -> Tensor:
        """See `MapLoss`."""
        return smooth_l1_loss(_angles(_gathered(student)), _angles(_gathered(teacher_BDhw)))


def _gathered(map_BChw: Tensor) -> Tensor:
    """Embeddings (B, E) of all processes' samples, with gradient: each adds its own rows to zeros."""
    rows, (rank, size) = map_BChw.float().flatten(1), world()
    if size == 1:
        return rows
    empty = torch.zeros_like(rows)
    return sum_over_ranks(torch.cat([rows if number == rank else empty for number in range(size)]))


def _distances(rows_BE: Tensor) -> Tensor:
    """Distances of all pairs (B, B) over the mean of the non-zero ones."""
    gram_BB = rows_BE @ rows_BE.T
    norm_B = gram_BB.diagonal()
    square_BB = (norm_B[:, None] + norm_B[None] - 2 * gram_BB).clamp(min=TINY)
    others_BB = 1 - torch.eye(len(rows_BE), device=rows_BE.device)
    distance_BB = square_BB.sqrt() * others_BB
    return distance_BB / (distance_BB.sum() / others_BB.sum().clamp(min=1)).clamp(min=TINY)


def _angles(rows_BE: Tensor) -> Tensor:
    """Cosines (B, B, B): at corner b, between the directions to the other two."""
    direction_BBE = normalize(rows_BE[None] - rows_BE[:, None], dim=2)
    return torch.bmm(direction_BBE, direction_BBE.mT)

"""Targets of self-distillation: prototype heads, and two ways to keep one prototype from taking everything.

Legend: M rows (views or tokens) of this process, K prototypes, D embedding, P bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy.teacher.objectives.contrastive_queue import EMPTY, KeyQueue, gather
from fmdeploy.training.distributed import sum_over_ranks, world

SINKHORN_ROUNDS = 3


class PrototypeHead(nn.Module):
    """From features to their likeness to K prototypes, in [-1, 1] (arXiv:2104.14294, section 3.1).

    Args:
        dim: D.
        hidden: Width of the two inner layers.
        bottleneck: P, the width in which likeness is a cosine.
        prototypes: K.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, features_MD: Tensor) -> Tensor:
        """Cosines (..., K) of features (..., D)."""
        with torch.autocast(features_MD.device.type, enabled=False):
            point_MP = F.normalize(self.project(features_MD.float()), dim=-1)
            return point_MP @ F.normalize(self.prototypes.float(), dim=-1).T


@torch.no_grad()
def sinkhorn(
    scores_MK: Tensor, temperature: float, *, rounds: int = SINKHORN_ROUNDS, parted: bool = True,
) -> Tensor:
    """Soft assignment of rows to prototypes in which every prototype gets an equal share of all processes' rows.

    Sinkhorn-Knopp as in SwAV (arXiv:2006.09882, section 3.1) and DINOv2 (arXiv:2304.07193, section 4): scale columns to
    M / K and rows to 1 in turn. It begins and ends with rows, so each row is a distribution.

    Args:
        scores_MK: Scores of rows; float.
        temperature: Smaller is sharper.
        rounds: Of scaling.
        parted: Whether other processes have other rows; False: each has all of them.
    """
    whole: Callable[[Tensor], Tensor] = sum_over_ranks if parted else torch.Tensor.clone
    share_MK = torch.softmax(scores_MK.float() / temperature, dim=-1)
    count = whole(share_MK.new_tensor(float(len(share_MK))))
    for _ in range(rounds):
        share_MK = share_MK / (whole(share_MK.sum(0)) * (share_MK.shape[1] / count)).clamp_min(1e-12)
        share_MK = share_MK / share_MK.sum(1, keepdim=True)
    return share_MK


class Remembered(nn.Module):
    """Sinkhorn-Knopp for few rows: it is balanced over this step's rows and those of the last steps.

    A batch of frames is smaller than the number of prototypes. Balanced over it alone, every view would have to get
    prototypes of its own, also the two views of one frame, and nothing could be learned (a queue as in SwAV,
    arXiv:2006.09882, section 4.1).

    Args:
        prototypes: K.
        size: Rows that are remembered.
    """

    def __init__(self, prototypes: int, size: int) -> None:
        super().__init__()
        self.past = KeyQueue(1, size, (prototypes,))
        self._seen: list[Tensor] = []

    @torch.no_grad()
    def forward(self, views: Sequence[Tensor], temperature: float) -> list[Tensor]:
        """Distributions (B, K) of every view's scores (B, K); the scores are remembered for `follow`."""
        rows_MK = torch.cat([gather(view_BK.float()) for view_BK in views])
        if self.training:
            self._seen.append(rows_MK)
        known_QK = self.past.keys_SQP[0][self.past.group_Q != EMPTY]
        found = sinkhorn(torch.cat((rows_MK, known_QK)), temperature, parted=False)[: len(rows_MK)]
        rank, size = world()
        return [found_BK.chunk(size)[rank] for found_BK in found.chunk(len(views))]

    def follow(self) -> None:
        """Remember what was seen since the last call."""
        for rows_MK in self._seen:
            self.past.push(rows_MK[None], torch.zeros(len(rows_MK), dtype=torch.int64, device=rows_MK.device))
        self._seen = []


class Centre(nn.Module):
    """A moving mean of the teacher's scores, taken away before its softmax (arXiv:2104.14294, equation 4).

    It pulls towards the uniform answer, sharpening away from it; together they avoid both collapses.

    Args:
        prototypes: K.
        keep: Share of the old mean that stays.
    """

    mean_K: Tensor

    def __init__(self, prototypes: int, keep: float) -> None:
        super().__init__()
        self.keep = keep
        self.register_buffer("mean_K", torch.zeros(prototypes))
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def forward(self, scores_MK: Tensor, temperature: float) -> Tensor:
        """Centred, sharpened distributions (M, K); the scores are remembered for `follow`."""
        if self.training:
            self._sums.append(torch.cat((scores_MK.float().sum(0), scores_MK.new_tensor([float(len(scores_MK))]))))
        return torch.softmax((scores_MK.float() - self.mean_K) / temperature, dim=-1)

    def follow(self) -> None:
        """Move to the mean of what was seen since the last call, over all processes."""
        if self._sums:
            total = sum_over_ranks(torch.stack(self._sums).sum(0))
            self.mean_K.lerp_(total[:-1] / total[-1], 1 - self.keep)
            self._sums = []


def cross_entropy(target_MK: Tensor, scores_MK: Tensor, temperature: float) -> Tensor:
    """-Σ target log softmax(scores / temperature) of each row, (...,) (arXiv:2104.14294, equation 2)."""
    return -(target_MK * F.log_softmax(scores_MK.float() / temperature, dim=-1)).sum(-1)

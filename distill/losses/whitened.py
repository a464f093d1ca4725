"""Squared error in units of the teacher's own spread.

Legend: B batch, D channels, h w rows and columns.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fmdeploy.distill.losses.base import LossConfig, MapLoss
from fmdeploy.distill.statistics import Statistics, Wide

How = Literal["channel", "phi-s", "zca"]


class WhitenedConfig(LossConfig):
    """How the teacher's features are standardised."""

    how: How = Field(default="channel", description="channel: unit variance each; phi-s: one scale; zca: decorrelated")
    floor: float = Field(default=1e-3, gt=0, description="smallest variance, as a share of the mean one")


class Whitened(MapLoss):
    """Mean squared error of standardised features, so that no teacher or channel counts more for being large.

    With the statistics of the cache, z = W (x - mean), and the loss is mean((z_student - z_teacher)²): 1 for a student
    that always answers the mean. `channel` divides each channel by its deviation; `phi-s` divides all by one number
    (PHI-S, arXiv:2410.01680, section 3.4: its rotation leaves a squared error as it is, so it is left out); `zca` is
    C^-1/2. The mean cancels in the difference.
    """

    name = "whitened"
    needs_statistics = True
    Config = WhitenedConfig
    config: WhitenedConfig

    def __call__(self, student: Tensor, teacher_BDhw: Tensor, statistics: Statistics | None = None) -> Tensor:
        """See `MapLoss`."""
        assert statistics is not None
        matrix_DD = _matrix(_Key(statistics), self.config.how, self.config.floor).to(teacher_BDhw.device)
        difference_BDhw = student.float() - teacher_BDhw.float()
        if matrix_DD.ndim == 1:
            return (difference_BDhw * matrix_DD[:, None, None]).square().mean()
        return torch.einsum("de,behw->bdhw", matrix_DD, difference_BDhw).square().mean()


class _Key:
    """Statistics by identity, for the memory of `_matrix`."""

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.statistics is self.statistics

    def __hash__(self) -> int:
        return id(self.statistics)


@lru_cache(maxsize=16)
def _matrix(key: _Key, how: How, floor: float) -> Tensor:
    """float32 (D, D), or its diagonal (D,)."""
    return torch.from_numpy(whitening(key.statistics, how, floor).astype(np.float32))


def whitening(statistics: Statistics, how: How, floor: float) -> Wide:
    """W of `Whitened`: (D, D), or its diagonal (D,) where it is diagonal."""
    covariance_DD = statistics.covariance_DD
    variance_D = np.diag(covariance_DD)
    least = floor * float(variance_D.mean()) or 1.0
    if how == "channel":
        return 1 / np.sqrt(np.maximum(variance_D, least))
    if how == "phi-s":
        return np.full(len(variance_D), 1 / math.sqrt(max(float(variance_D.mean()), least)))
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    result: Wide = (vectors_DD / np.sqrt(np.maximum(values_D, least))) @ vectors_DD.T
    return result

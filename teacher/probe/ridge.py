"""Ridge regression from sums: moments add up, so any subset of domains is fitted without another pass.

W = (C + λ I)⁻¹ S with C the covariance of the standardised features and S that with the labels (Hoerl and Kennard 1970,
equation 2.1, divided by the number of rows). One eigendecomposition of C gives every λ.

Legend: R rows, D features, T targets, L strengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-6


@dataclass(frozen=True)
class Moments:
    """Sums over rows, float64: all that ridge regression needs."""

    count: float
    x_D: Tensor
    y_T: Tensor
    xx_DD: Tensor
    xy_DT: Tensor

    @staticmethod
    def of(x_RD: Tensor, y_RT: Tensor) -> Moments:
        """Sums of float32 rows; products run in float32, a chunk of rows at a time."""
        return Moments(float(len(x_RD)), x_RD.sum(0).double(), y_RT.sum(0).double(), (x_RD.T @ x_RD).double(),
                       (x_RD.T @ y_RT).double())

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.x_D + other.x_D, self.y_T + other.y_T,
                       self.xx_DD + other.xx_DD, self.xy_DT + other.xy_DT)


@dataclass(frozen=True)
class Linear:
    """`x @ weights + bias`, float32."""

    weights_DT: Tensor
    bias_T: Tensor

    def __call__(self, x_RD: Tensor) -> Tensor:
        """Answers (R, T)."""
        return torch.addmm(self.bias_T, x_RD, self.weights_DT)


def fit_ridge(moments: Moments, strengths: tuple[float, ...]) -> list[Linear]:
    """One fit for each strength; features count by their spread, the bias is not shrunk."""
    mean_D, label_T = moments.x_D / moments.count, moments.y_T / moments.count
    covariance_DD = moments.xx_DD / moments.count - torch.outer(mean_D, mean_D)
    spread_D = covariance_DD.diagonal().clamp_min(TINY * TINY).sqrt().clamp_min(TINY)
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD / torch.outer(spread_D, spread_D))
    cross_DT = (moments.xy_DT / moments.count - torch.outer(mean_D, label_T)) / spread_D[:, None]
    turned_DT = vectors_DD.T @ cross_DT
    found = []
    for strength in strengths:
        scaled_DT = vectors_DD @ (turned_DT / (values_D.clamp_min(0) + strength)[:, None])
        weights_DT = scaled_DT / spread_D[:, None]
        found.append(Linear(weights_DT.float(), (label_T - mean_D @ weights_DT).float()))
    return found

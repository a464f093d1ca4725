"""`pca:AMOUNT+INNER`: a feature map in the basis of its principal components.

Legend: B samples, D channels, K components, h w rows and columns, T tokens (vectors of D channels).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fmdeploy.task import Array, Arrays
from fmdeploy.teacher.encodings.base import Encoding, Part

BASIS, MEAN = "basis", "mean"


class Pca(Encoding):
    """Coefficients (K, h, w) of the centred tokens, themselves stored by another encoding.

    Args:
        shape: (D, h, w).
        basis_KD: Orthonormal rows, by falling variance.
        mean_D: Mean token.
        inner: How the coefficients are stored.
    """

    def __init__(self, shape: tuple[int, ...], basis_KD: Array, mean_D: Array, inner: Encoding) -> None:
        super().__init__(shape)
        self.basis_KD, self.mean_D, self.inner = basis_KD, mean_D, inner
        self.guarded, self.notices = inner.guarded, inner.notices
        self.limit = inner.limit / (2 * len(mean_D) ** 0.5)  # no coefficient is longer than the centred token

    def parts(self) -> Mapping[str, Part]:
        """Those of the inner encoding."""
        return self.inner.parts()

    def encode(self, value: Array) -> Arrays:
        """Coefficients of maps (B, D, h, w), encoded."""
        tokens_BDT = value.reshape(*value.shape[:2], -1) - self.mean_D[:, None]
        return self.inner.encode(np.matmul(self.basis_KD, tokens_BDT).reshape(len(value), *self.inner.shape))

    def decode(self, parts: Arrays) -> Array:
        """Maps float32 (B, D, h, w): the nearest ones that the K components can say."""
        kept_BKhw = self.inner.decode(parts)
        kept_BKT = kept_BKhw.reshape(*kept_BKhw.shape[:2], -1).astype(np.float32, copy=False)
        value_BDT = np.matmul(self.basis_KD.T, kept_BKT)
        value_BDT += self.mean_D[:, None]
        return np.asarray(value_BDT.reshape(-1, *self.shape))


class Moments:
    """Sums over tokens that the components follow from; memory does not grow with the samples."""

    def __init__(self, channels: int) -> None:
        self.count, self.sum_D = 0, np.zeros(channels)
        self.products_DD = np.zeros((channels, channels))

    def add(self, value_BDhw: Array) -> None:
        """Take in the tokens of maps (B, D, h, w)."""
        tokens_DT = np.moveaxis(value_BDhw.astype(np.float64), 1, 0).reshape(len(self.sum_D), -1)
        self.count += tokens_DT.shape[1]
        self.sum_D += tokens_DT.sum(1)
        self.products_DD += tokens_DT @ tokens_DT.T

    def components(self, amount: float) -> Arrays:
        """`basis` (K, D) and `mean` (D,), float32.

        Args:
            amount: At least 1: how many components. Below 1: as many as explain that share of the variance.
        """
        mean_D = self.sum_D / self.count
        values_D, vectors_DD = np.linalg.eigh(self.products_DD / self.count - np.outer(mean_D, mean_D))
        values_D, vectors_DD = np.maximum(values_D[::-1], 0), vectors_DD[:, ::-1].T
        share_D = np.cumsum(values_D) / max(float(values_D.sum()), np.finfo(np.float64).tiny)
        keep = int(amount) if amount >= 1 else int(np.searchsorted(share_D, amount)) + 1
        basis_KD = vectors_DD[: min(keep, len(values_D))]
        # An eigenvector has no sign of its own: its largest entry is made positive, so equal tokens give equal bytes.
        sign_K = np.sign(np.take_along_axis(basis_KD, np.abs(basis_KD).argmax(1)[:, None], 1))
        return {BASIS: np.ascontiguousarray(basis_KD * sign_K, np.float32), MEAN: mean_D.astype(np.float32)}

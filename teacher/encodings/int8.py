"""`int8`: whole numbers and a scale for each token (features) or each plane (outputs).

Legend: B samples, D channels, h w rows and columns; a token is the vector (D,) of one position.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fmdeploy.task import Array, Arrays
from fmdeploy.teacher.encodings.base import MAIN, Encoding, Part

LEVELS = 127
SCALE = "scale"


class Int8(Encoding):
    """Symmetric: x ≈ scale · q with q in -127 … 127, so |error| ≤ scale / 2.

    The scale is the token's largest |x| over 127, rounded *up* to float16: nothing is clipped, and a scale costs two
    bytes. A token of 208 channels takes 210 bytes in place of 416 in float16.

    Args:
        shape: (D, h, w), or (C,) of a vector.
        axes: Axes of one sample that share a scale: (0,) for the channels of a token, (1, 2) for a plane.
    """

    guarded = (SCALE,)
    notices = True
    limit = LEVELS * float(np.finfo(np.float16).max)

    def __init__(self, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.axes = tuple(axis + 1 for axis in axes)
        self.kept = tuple(size for axis, size in enumerate(shape) if axis not in axes)

    def parts(self) -> Mapping[str, Part]:
        """The whole numbers, and the scales."""
        return {MAIN: Part(np.dtype(np.int8), self.shape), SCALE: Part(np.dtype(np.float16), self.kept)}

    def encode(self, value: Array) -> Arrays:
        """Whole numbers (B, ...) and scales (B, h, w), (B, C) or (B,).

        Raises:
            FloatingPointError: a token holds NaN, or more than `limit`.
        """
        import torch

        x = torch.from_numpy(value)
        largest = torch.maximum(x.amax(self.axes, keepdim=True), -x.amin(self.axes, keepdim=True)).double().numpy()
        if not (largest <= self.limit).all():
            raise FloatingPointError
        scale = _up_to_half(largest / LEVELS)
        wide = torch.from_numpy(np.where(scale == 0, np.float16(1), scale).astype(np.float32))
        whole = (x / wide).round_().to(torch.int8).numpy()
        return {MAIN: whole, SCALE: scale.reshape(len(value), *self.kept)}

    def decode(self, parts: Arrays) -> Array:
        """float32 (B, ...)."""
        value: Array = parts[MAIN].astype(np.float32)
        value *= np.expand_dims(parts[SCALE].astype(np.float32), self.axes)
        return value


def _up_to_half(x: Array) -> Array:
    """The smallest float16 that is not below each x ≥ 0."""
    near = x.astype(np.float16)
    return np.where(near.astype(np.float64) < x, np.nextafter(near, np.float16(np.inf)), near)

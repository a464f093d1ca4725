"""The one grid: INT8 scales that float32 and float16 spell alike.

`model.int8.onnx` holds its scales in float16, the fake-quantised module and `model.int8-cpu.onnx` in float32. Where a
scale is a float16 number to begin with, the three compute on the same grid and can be compared step by step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmdeploy.errors import DataError

STEPS = 127  # of a symmetric signed 8-bit grid, on either side of zero
SMALLEST = 2.0**-24  # the smallest float16 above zero
LARGEST = torch.finfo(torch.float16).max


def fp16_amax(amax: Tensor) -> Tensor:
    """Return the smallest range that is at least `amax` and whose scale, range / 127, is exactly a float16 number.

    127 times a float16 number has 18 significant bits: float32 holds it exactly, and the division gives the very
    float16 number back. A range of 0 gets the smallest scale there is, 2^-24.

    Args:
        amax: Any shape, float32, at least 0.

    Returns:
        The same shape, float32. Where the scale is a normal float16 number, less than 2^-10 larger than `amax`.

    Raises:
        DataError: a range is negative, NaN, or too large for a float16 scale (above 8.3 million).
    """
    amax = amax.detach().float()
    if not bool(((amax >= 0) & (amax <= STEPS * LARGEST)).all()):
        raise DataError("a range does not fit a float16 scale", expected=f"0 to {STEPS * LARGEST:.4g}",
                        found=f"{float(amax.min()):.4g} to {float(amax.max()):.4g}")
    scale = (amax / STEPS).half()
    # Positive float16 numbers are ordered as the integers that their bits spell: + 1 is the next larger one.
    larger = (scale.view(torch.int16) + 1).view(torch.float16)
    scale = torch.where(STEPS * scale.float() < amax, larger, scale).float()
    return STEPS * scale.clamp(min=SMALLEST)

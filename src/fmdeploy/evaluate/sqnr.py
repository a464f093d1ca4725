"""Signal-to-quantisation-noise ratio: the unit in which two variants of a model are compared."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def sqnr_db(reference: NDArray[Any], found: NDArray[Any]) -> float:
    """Return 20 log10(|reference| / |reference - found|) in dB over all elements.

    Infinite where both are equal, minus infinity where `found` is not finite or the reference is zero.
    Source: the definition of signal-to-quantisation-noise ratio, Oppenheim and Schafer 2010, section 4.8.3.
    """
    wanted, got = np.asarray(reference, np.float64), np.asarray(found, np.float64)
    if wanted.shape != got.shape or not np.isfinite(got).all():
        return -math.inf
    return power_db(float(np.linalg.norm(wanted)) ** 2, float(np.linalg.norm(got - wanted)) ** 2)


def power_db(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise) of two powers; infinite without noise, minus infinity without signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def cosine(reference: NDArray[Any], found: NDArray[Any]) -> float:
    """Return the cosine of the angle between two arrays taken as vectors: 1 where only the scale differs.

    NaN where one of them is zero, or `found` is not finite.
    """
    wanted, got = np.asarray(reference, np.float64).ravel(), np.asarray(found, np.float64).ravel()
    lengths = float(np.linalg.norm(wanted) * np.linalg.norm(got))
    return float(wanted @ got) / lengths if wanted.shape == got.shape and lengths > 0 else math.nan


def finite_db(value: float) -> float:
    """Return `value` as JSON can hold it: an exact match is written as 999 dB, no match at all as -999."""
    return float(np.clip(value, -999.0, 999.0))

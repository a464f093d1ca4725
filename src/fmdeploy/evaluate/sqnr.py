"""Signal-to-quantisation-noise ratio: the unit in which two variants of a model are compared."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def sqnr_db(reference: NDArray[Any], found: NDArray[Any]) -> float:
    """Return 20 log10(|reference| / |reference - found|) in dB over all elements.

    Infinite where both are equal, minus infinity where `found` is not finite or the reference is zero.
    Source: the definition of signal-to-quantisation-noise ratio, Oppenheim and Schafer 2010, section 4.8.3.
    """
    wanted, got = np.asarray(reference, np.float64), np.asarray(found, np.float64)
    if wanted.shape != got.shape or not np.isfinite(got).all():
        return -math.inf
    noise, signal = float(np.linalg.norm(got - wanted)), float(np.linalg.norm(wanted))
    if noise == 0:
        return math.inf
    return 20 * math.log10(signal / noise) if signal > 0 else -math.inf


def finite_db(value: float) -> float:
    """Return `value` as JSON can hold it: an exact match is written as 999 dB, no match at all as -999."""
    return float(np.clip(value, -999.0, 999.0))

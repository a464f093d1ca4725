"""Is what the model gave back finite, and of a size that the calibration set gave?

A dot product with itself is finite only when every value is, and it is the energy of the output: one pass answers both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.iospec import TensorSpec
from fmdeploy.runtime.bundle import OutputStatistics
from fmdeploy.runtime.frame import Finding, Reason


class OutputGuard:
    """One output of floats: the band of its energy, and what it means to leave it."""

    def __init__(self, spec: TensorSpec, known: OutputStatistics | None, sigma: float) -> None:
        """Without `known` statistics, or with `sigma` 0, only NaN and infinity are looked for."""
        self.name, self._known = spec.name, known
        self.low, self.high = -math.inf, float(np.finfo(np.float64).max)
        if known is not None and sigma:
            reach = sigma * known.rms_std
            cells = math.prod(spec.shape)
            self.low = cells * max(min(known.rms_min, known.rms_mean - reach), 0.0) ** 2
            self.high = cells * max(known.rms_max, known.rms_mean + reach) ** 2

    def check(self, array: Array, found: list[Finding]) -> None:
        """Append to `found` what speaks against an output."""
        if self.low <= float(np.vdot(array, array)) <= self.high:
            return
        if not np.isfinite(array).all():
            found.append(Finding(Reason.NOT_FINITE_OUTPUT, f"{self.name}: NaN or infinity"))
        elif self._known is not None:
            rms = math.sqrt(float(np.mean(np.square(array, dtype=np.float64))))
            text = (f"{self.name}: root mean square {rms:.4g}, calibration gave "
                    f"{self._known.rms_min:.4g}..{self._known.rms_max:.4g}")
            found.append(Finding(Reason.UNUSUAL_OUTPUT, text))


class Band(NamedTuple):
    """Between which energies an output is taken without a word."""

    name: str
    low: float
    high: float
    guard: OutputGuard


def output_guards(
    specs: tuple[TensorSpec, ...], known: Mapping[str, OutputStatistics], sigma: float
) -> tuple[Band, ...]:
    """One band an output that has NaN: integers cannot be broken."""
    guards = [OutputGuard(spec, known.get(spec.name), sigma) for spec in specs if np.dtype(spec.dtype).kind == "f"]
    return tuple(Band(guard.name, guard.low, guard.high, guard) for guard in guards)

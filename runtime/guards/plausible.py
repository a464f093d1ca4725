"""Is what the model gave back finite, and of a size that the calibration set gave?

A dot product with itself is finite only when every value is, and it is the energy of the output: one pass answers both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.iospec import TensorSpec
from fmdeploy.runtime.bundle import OutputStatistics
from fmdeploy.runtime.frame import Finding, Reason


class OutputGuard:
    """The checks of one output."""

    def __init__(self, spec: TensorSpec, known: OutputStatistics | None, sigma: float) -> None:
        """Without `known` statistics, or with `sigma` 0, only NaN and infinity are looked for."""
        self.name, self._known = spec.name, known
        self._float = np.dtype(spec.dtype).kind == "f"
        self._low, self._high = -math.inf, float(np.finfo(np.float64).max)
        if known is not None and sigma:
            reach = sigma * known.rms_std
            cells = math.prod(spec.shape)
            self._low = cells * max(min(known.rms_min, known.rms_mean - reach), 0.0) ** 2
            self._high = cells * max(known.rms_max, known.rms_mean + reach) ** 2

    def check(self, array: Array, found: list[Finding]) -> None:
        """Append to `found` what speaks against an output."""
        if not self._float or self._low <= float(np.vdot(array, array)) <= self._high:
            return
        if not np.isfinite(array).all():
            found.append(Finding(Reason.NOT_FINITE_OUTPUT, f"{self.name}: NaN or infinity"))
        elif self._known is not None:
            rms = math.sqrt(float(np.mean(np.square(array, dtype=np.float64))))
            text = (f"{self.name}: root mean square {rms:.4g}, calibration gave "
                    f"{self._known.rms_min:.4g}..{self._known.rms_max:.4g}")
            found.append(Finding(Reason.UNUSUAL_OUTPUT, text))


def output_guards(
    specs: tuple[TensorSpec, ...], known: Mapping[str, OutputStatistics], sigma: float
) -> dict[str, OutputGuard]:
    """One guard an output, by name."""
    return {spec.name: OutputGuard(spec, known.get(spec.name), sigma) for spec in specs}


def check_outputs(guards: Mapping[str, OutputGuard], outputs: Arrays) -> list[Finding]:
    """Return what speaks against the outputs of one run."""
    found: list[Finding] = []
    for name, array in outputs.items():
        guards[name].check(array, found)
    return found

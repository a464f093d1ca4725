"""Is every value of an input a number, and in range? All of them, every frame: INT8 turns NaN into plausible numbers.

One pass answers all three questions: non-negative IEEE 754 floats order like their bit patterns, and NaN, infinity and
negative numbers have larger ones, so one unsigned integer maximum proves [0, high].
"""

from __future__ import annotations

import math

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.iospec import TensorSpec
from fmdeploy.runtime.frame import Finding, Reason
from fmdeploy.runtime.guards.views import Views


class ValueGuard:
    """NaN, infinity and range of one input."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec, self.name = spec, spec.name
        dtype = np.dtype(spec.dtype)
        self._float = dtype.kind == "f"
        self.high_bits = self._bits_of_range(dtype)

    @property
    def reads_bits(self) -> bool:
        """Whether `Views.bits` must be unsigned integers, of which none is above `high_bits`."""
        return self.high_bits is not None

    def check(self, views: Views) -> Finding | None:
        """Find values that are not finite or out of range."""
        if self.high_bits is not None:
            if int(np.maximum.reduce(views.bits)) <= self.high_bits:
                return None
        elif self.spec.value_range is not None:
            low, high = self.spec.value_range
            # NaN spreads through both reductions and fails both comparisons.
            if np.minimum.reduce(views.bits) >= low and np.maximum.reduce(views.bits) <= high:
                return None
        elif not self._float or math.isfinite(np.vdot(views.bits, views.bits)):
            return None
        return self._explain(views.value)

    def _explain(self, value: Array) -> Finding | None:
        """Say exactly what is wrong; None where the fast check was too careful (-0.0, or a sum that overflowed)."""
        broken = value.size - int(np.count_nonzero(np.isfinite(value)))
        if broken:
            return Finding(Reason.NOT_FINITE, f"{self.name}: {broken} of {value.size} values are NaN or infinite")
        if self.spec.value_range is None:
            return None
        (low, high), least, most = self.spec.value_range, float(value.min()), float(value.max())
        if least >= low and most <= high:
            return None
        text = f"{self.name}: values {least:.4g}..{most:.4g}, expected {low:.4g}..{high:.4g}"
        return Finding(Reason.OUT_OF_RANGE, text)

    def _bits_of_range(self, dtype: np.dtype[np.generic]) -> int | None:
        low, high = self.spec.value_range or (None, None)
        if dtype == np.float32 and low == 0 and high is not None and high > 0:
            return int(np.float32(high).view(np.uint32))
        return None

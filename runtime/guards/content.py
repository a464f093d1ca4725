"""Guards between the sensors and the model, before quantisation: INT8 turns NaN into plausible numbers.

A guard may cost a few microseconds, so each input is read twice and written never:
- range and NaN in one pass: non-negative IEEE 754 floats order like their bit patterns, and NaN, infinity and negative
  numbers have larger ones, so one unsigned integer maximum answers for [0, high];
- all channel sums in the other, one BLAS matrix-vector product; they answer three questions: are they like the
  calibration set's, are they the previous frame's (only then the bytes are compared), is a channel its first value
  times its size (only then is it looked at for being constant).

An array that owns its memory, in C order, is used in place: the caller must not write to it until `infer` returns.
Everything else (views of shared or driver memory, other orders) is copied once, so that what was checked is what runs.

Legend: C channels of an input, S cells of a channel.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import le
from typing import NamedTuple

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.errors import ArtifactError, FrameError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.runtime.bundle import InputStatistics
from fmdeploy.runtime.frame import Finding, Reason
from fmdeploy.runtime.guards.structure import StructureGuard

# Rounding of a float32 sum of equal values stays far below this share of it.
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class GuardConfig:
    """Which guards run, and how strict they are.

    Attributes:
        finite_and_range: Refuse NaN, infinity and values outside the specification's range.
        low_information: Flag inputs whose every channel is constant.
        frozen_after: Flag an input after this many repetitions of the same bytes; 0 switches the guard off, for
            samples that are not a stream.
        unusual_sigma: Warn when a channel's mean is this many calibration standard deviations off; 0 switches it off.
        outputs: Flag NaN and infinity in outputs.
        always_copy: Copy arrays that own their memory too, for callers whose threads write to them meanwhile.
    """

    finite_and_range: bool = True
    low_information: bool = True
    frozen_after: int = 10
    unusual_sigma: float = 8.0
    outputs: bool = True
    always_copy: bool = False


SAMPLES = GuardConfig(frozen_after=0)  # for evaluation: samples repeat, a sensor must not


class InputGuard:
    """The checks of one input's content, and the memory of the frozen guard."""

    def __init__(self, spec: TensorSpec, statistics: InputStatistics, config: GuardConfig) -> None:
        self.spec, self.name, self.config = spec, spec.name, config
        self.repeats = 0
        self._held: Array | None = None
        dtype = np.dtype(spec.dtype)
        self._float = dtype.kind == "f"
        self._channels = spec.shape[0] if len(spec.shape) > 1 else 1  # a vector is one channel, as in calibration
        self._cells = math.prod(spec.shape) // self._channels
        # Sums of small integer types need a wider accumulator; for floats BLAS wants equal types.
        self._ones = np.ones(self._cells, dtype if self._float else np.float64)
        self._high_bits = self._bits_of_range(dtype)
        self._low, self._high = self._sum_limits(statistics)
        self._mean = statistics.channel_mean
        self._previous: list[float] = [math.nan] * self._channels

    def own(self, value: Array) -> Array:
        """Return the array to check and run: the value itself, or a copy of it, C-contiguous."""
        flags = value.flags
        if flags.c_contiguous and flags.owndata and not self.config.always_copy:
            return value
        return value.copy(order="C")

    def fatal(self, value: Array) -> Finding | None:
        """Find values that are not finite or out of range."""
        if self._high_bits is not None:
            fine = int(np.maximum.reduce(value.reshape(-1).view(np.uint32))) <= self._high_bits
        elif self.spec.value_range is not None:
            low, high = self.spec.value_range
            # NaN spreads through both reductions and fails both comparisons.
            least, most = np.minimum.reduce(value, axis=None), np.maximum.reduce(value, axis=None)
            fine = bool(least >= low and most <= high)
        else:
            fine = not self._float or math.isfinite(np.vdot(value, value))
        return None if fine else self._explain(value)

    def doubts(self, value: Array, found: list[Finding]) -> None:
        """Append to `found` what speaks against a frame that may run: constant, frozen, unlike calibration."""
        config = self.config
        sums: list[float] = value.reshape(self._channels, -1).dot(self._ones).tolist()
        if config.unusual_sigma and not (all(map(le, self._low, sums)) and all(map(le, sums, self._high))):
            found.append(self._unusual(sums))
        if config.low_information and self._looks_constant(sums[0], value) and self._is_constant(value):
            found.append(Finding(Reason.LOW_INFORMATION, f"{self.name}: every channel is constant"))
        if config.frozen_after:
            if sums == self._previous:
                self._compare(value)
            elif self.repeats:
                self._held, self.repeats = None, 0
            self._previous = sums
            if self.repeats >= config.frozen_after:
                text = f"{self.name}: the same bytes for {self.repeats + 1} frames"
                found.append(Finding(Reason.FROZEN, text))

    def _compare(self, value: Array) -> None:
        """The sums repeat: compare the bytes with the frame that was held when they first did."""
        if self._held is not None and np.array_equal(self._held, value):
            self.repeats += 1
        else:
            self._held, self.repeats = value.copy(), 1

    def _looks_constant(self, total: float, value: Array) -> bool:
        first = float(value.item(0)) * self._cells
        return self._cells > 1 and abs(total - first) <= SUM_TOLERANCE * abs(first)

    def _is_constant(self, value: Array) -> bool:
        rows = value.reshape(self._channels, -1)
        return bool((rows == rows[:, :1]).all())

    def _unusual(self, sums: list[float]) -> Finding:
        limits = zip(self._low, sums, self._high, strict=True)
        at = next(number for number, (low, total, high) in enumerate(limits) if not low <= total <= high)
        label = self.spec.channels[at] if len(self.spec.channels) == self._channels else f"channel {at}"
        text = f"{self.name}: mean of {label} is {sums[at] / self._cells:.4g}, calibration saw {self._mean[at]:.4g}"
        return Finding(Reason.UNUSUAL_INPUT, text)

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

    def _sum_limits(self, known: InputStatistics) -> tuple[list[float], list[float]]:
        """Lowest and highest usual sum of each channel (C)."""
        if not len(known.channel_mean) == len(known.channel_std) == self._channels:
            raise ArtifactError("the calibration statistics do not fit", where=f"input {self.name!r}",
                                expected=f"{self._channels} channels", found=len(known.channel_mean))
        least, most = self.spec.value_range or (known.min or 0.0, known.max or 1.0)
        # A channel that never moved in calibration has no spread: allow it a thousandth of the range.
        margins = [max(self.config.unusual_sigma * spread, 1e-3 * (most - least)) for spread in known.channel_std]
        pairs = list(zip(known.channel_mean, margins, strict=True))
        return ([(mean - margin) * self._cells for mean, margin in pairs],
                [(mean + margin) * self._cells for mean, margin in pairs])


class Judged(NamedTuple):
    """What the guards say of a frame's content.

    Attributes:
        feeds: What the model may see: by name, with a batch axis; None where it must not see the frame.
        findings: What was found.
        scores: Named numbers, such as `lidar.distance`.
    """

    feeds: Arrays | None
    findings: list[Finding]
    scores: dict[str, float]


class Guards:
    """All guards of one model."""

    def __init__(self, io: IOSpec, statistics: Mapping[str, InputStatistics], config: GuardConfig) -> None:
        self.config = config
        self._structure = [StructureGuard(spec) for spec in io.inputs]
        self._inputs = [InputGuard(spec, statistics[spec.name], config) for spec in io.inputs]
        self._names = {spec.name for spec in io.inputs}

    def structure(
        self, inputs: object, layouts: Mapping[str, str] | None, missing: Collection[str] = ()
    ) -> None:
        """Check the names and then every input's structure.

        Raises:
            FrameError: On the first difference.
        """
        if type(inputs) is not dict:
            raise FrameError("a frame is a dict of input name to array", expected=sorted(self._names),
                             found=type(inputs).__name__)
        if inputs.keys() != self._names:
            raise FrameError("a frame has exactly the inputs of io.json", expected=sorted(self._names),
                             found=sorted(map(str, inputs)))
        if layouts and not layouts.keys() <= self._names:
            raise FrameError("a layout is given for an input that io.json lacks", expected=sorted(self._names),
                             found=sorted(map(str, layouts)))
        for guard in self._structure:
            guard.check(inputs[guard.name], layouts.get(guard.name) if layouts else None)

    def before(self, inputs: Arrays, missing: Collection[str] = (), *, refused: bool = False) -> Judged:
        """Judge the content of a frame.

        Args:
            inputs: Inputs whose structure was checked.
            missing: Inputs whose sensor is not there.
            refused: The frame must not run, whatever its content.
        """
        values = self.own(inputs)
        findings = self.fatal(values)
        if findings:
            return Judged(None, findings, {})
        findings = self.doubts(values)
        return Judged(None if refused else self.feeds(values), findings, {})

    def own(self, inputs: Arrays) -> list[Array]:
        """Return what to check and run, in the order of the specification: the inputs, or copies of them."""
        return [guard.own(inputs[guard.name]) for guard in self._inputs]

    def feeds(self, values: Sequence[Array]) -> Arrays:
        """Return owned values as the model takes them: by name, with a batch axis."""
        return {guard.name: value[None] for guard, value in zip(self._inputs, values, strict=True)}

    def fatal(self, values: Sequence[Array]) -> list[Finding]:
        """Findings after which the model must not see the frame."""
        if not self.config.finite_and_range:
            return []
        pairs = zip(self._inputs, values, strict=True)
        return [found for guard, value in pairs if (found := guard.fatal(value)) is not None]

    def doubts(self, values: Sequence[Array]) -> list[Finding]:
        """Findings about frames that may run: not fresh, not informative, or unlike the calibration set."""
        found: list[Finding] = []
        for guard, value in zip(self._inputs, values, strict=True):
            guard.doubts(value, found)
        return found

    def outputs(self, outputs: Arrays) -> list[Finding]:
        """Findings about what the model gave back."""
        found: list[Finding] = []
        if self.config.outputs:
            for name, array in outputs.items():
                # A dot product with itself is finite only when every value is; a huge value overflows it: look closer.
                if array.dtype.kind != "f" or math.isfinite(np.vdot(array, array)) or np.isfinite(array).all():
                    continue
                found.append(Finding(Reason.NOT_FINITE_OUTPUT, f"{name}: NaN or infinity"))
        return found

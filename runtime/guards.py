"""Guards between the sensors and the model, before quantisation: INT8 turns NaN into plausible numbers.

A guard costs a few microseconds, and a numpy call costs more than what it computes, so inputs of one kind (dtype, grid,
range) share a block, that is one buffer, and every check is one call a block:
- the frame is copied once into the block, so that nobody can change it between a check and the run, and strides or
  order of the caller's arrays cost nothing later;
- range and NaN in one pass: non-negative IEEE 754 floats order like their bit patterns, and NaN, infinity and negative
  numbers have larger ones, so one unsigned integer maximum answers for [0, high];
- all channel sums are one BLAS matrix-vector product; they answer three questions: are they like the calibration set's,
  are they the previous frame's (only then the bytes are compared), is a channel its first value times its size (only
  then is it looked at for being constant).

Legend: C channels of a block, S cells of a channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import le
from typing import Any

import numpy as np

from fmdeploy.errors import ArtifactError, FrameError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.runtime.bundle import InputStatistics
from fmdeploy.runtime.frame import Finding, Reason
from fmdeploy.runtime.protocol import Array, Arrays
from fmdeploy.runtime.structure import StructureGuard

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
    """

    finite_and_range: bool = True
    low_information: bool = True
    frozen_after: int = 10
    unusual_sigma: float = 8.0
    outputs: bool = True


SAMPLES = GuardConfig(frozen_after=0)  # for evaluation: samples repeat, a sensor must not


class Member:
    """One input inside a block: its channels, and the memory of the frozen guard."""

    def __init__(self, spec: TensorSpec, first: int) -> None:
        self.spec, self.name = spec, spec.name
        self.first, self.last = first, first + _channels(spec)
        self.repeats = 0
        self._held: Array | None = None

    def repeated(self, values: Array, after: int) -> Finding | None:
        """Called when the channel sums equal the previous frame's: compare the bytes with the frame held since then."""
        if self._held is not None and np.array_equal(self._held, values):
            self.repeats += 1
        else:
            self._held, self.repeats = values.copy(), 1
        if self.repeats < after:
            return None
        return Finding(Reason.FROZEN, f"{self.name}: the same bytes for {self.repeats + 1} frames")

    def moved(self) -> None:
        """Called when the content changed."""
        self._held, self.repeats = None, 0


class Block:
    """Inputs of equal dtype, grid and range in one buffer."""

    def __init__(
        self, specs: Sequence[TensorSpec], statistics: Mapping[str, InputStatistics], config: GuardConfig
    ) -> None:
        self.config, self.spec = config, specs[0]
        rows = [_channels(spec) for spec in specs]
        starts = [sum(rows[:at]) for at in range(len(rows))]
        self.members = [Member(spec, start) for spec, start in zip(specs, starts, strict=True)]
        self._names = [spec.name for spec in specs]
        dtype = np.dtype(self.spec.dtype)
        self._buffer = np.zeros((1, sum(spec.shape[0] for spec in specs), *self.spec.shape[1:]), dtype)
        self._inner, self._flat = self._buffer[0], self._buffer.reshape(-1)
        self._rows_CS = self._buffer.reshape(sum(rows), -1)
        self._cells = self._rows_CS.shape[1]
        # Sums of small integer types need a wider accumulator; for floats BLAS wants equal types.
        self._ones = np.ones(self._cells, dtype if dtype.kind == "f" else np.float64)
        vector = len(self.spec.shape) == 1  # alone in its block, with all of its values in one channel
        self.feeds = {m.name: self._buffer if vector else self._buffer[:, m.first : m.last] for m in self.members}
        self._high_bits, self._bits = self._bit_range(dtype)
        self._low, self._high, self._mean = _sum_limits(specs, statistics, config.unusual_sigma, self._cells)
        self._previous: list[float] = [math.nan] * sum(rows)

    def take(self, inputs: Arrays) -> None:
        """Copy the inputs, which passed the structure guard, into the block."""
        np.concatenate([inputs[name] for name in self._names], out=self._inner)

    def fatal(self) -> Sequence[Finding]:
        """Find values that are not finite or out of range."""
        if self._high_bits is not None:
            fine = int(np.maximum.reduce(self._bits)) <= self._high_bits
        elif self.spec.value_range is not None:
            low, high = self.spec.value_range
            # NaN spreads through both reductions and fails both comparisons.
            fine = bool(np.minimum.reduce(self._flat) >= low and np.maximum.reduce(self._flat) <= high)
        else:
            fine = self._flat.dtype.kind != "f" or math.isfinite(self._flat.dot(self._flat))
        return () if fine else [found for member in self.members if (found := self._explain(member)) is not None]

    def doubts(self) -> Sequence[Finding]:
        """Find inputs that are constant, frozen or unlike the calibration set."""
        sums: list[float] = self._rows_CS.dot(self._ones).tolist()
        found: list[Finding] = []
        if self.config.unusual_sigma and not (all(map(le, self._low, sums)) and all(map(le, sums, self._high))):
            found += self._unusual(sums)
        for member in self.members:
            if self.config.low_information and self._looks_constant(sums, member):
                found += self._low_information(member)
            if self.config.frozen_after:
                found += self._frozen(sums, member)
        self._previous = sums
        return found

    def _bit_range(self, dtype: np.dtype[Any]) -> tuple[int | None, Array]:
        low, high = self.spec.value_range or (None, None)
        if dtype == np.float32 and low == 0 and high is not None and high > 0:
            return int(np.float32(high).view(np.uint32)), self._flat.view(np.uint32)
        return None, self._flat

    def _looks_constant(self, sums: list[float], member: Member) -> bool:
        if self._cells == 1:
            return False
        total, first = sums[member.first], float(self._flat.item(member.first * self._cells)) * self._cells
        return abs(total - first) <= SUM_TOLERANCE * abs(first)

    def _low_information(self, member: Member) -> Sequence[Finding]:
        rows = self._rows_CS[member.first : member.last]
        if (rows != rows[:, :1]).any():
            return ()
        return (Finding(Reason.LOW_INFORMATION, f"{member.name}: every channel is constant"),)

    def _frozen(self, sums: list[float], member: Member) -> Sequence[Finding]:
        first, last = member.first, member.last
        if sums[first] != self._previous[first] or sums[first:last] != self._previous[first:last]:
            member.moved()
            return ()
        found = member.repeated(self._rows_CS[first:last], self.config.frozen_after)
        return () if found is None else (found,)

    def _unusual(self, sums: list[float]) -> list[Finding]:
        findings = []
        for member in self.members:
            off = [at for at in range(member.first, member.last) if not self._low[at] <= sums[at] <= self._high[at]]
            if off:
                names = member.spec.channels
                at = off[0] - member.first
                label = names[at] if len(names) == member.last - member.first else f"channel {at}"
                text = (f"{member.name}: mean of {label} is {sums[off[0]] / self._cells:.4g}, "
                        f"calibration saw {self._mean[off[0]]:.4g}")
                findings.append(Finding(Reason.UNUSUAL_INPUT, text))
        return findings

    def _explain(self, member: Member) -> Finding | None:
        """Say exactly what is wrong; None where the fast check was too careful (-0.0, or a sum that overflowed)."""
        values = self._rows_CS[member.first : member.last]
        broken = values.size - int(np.count_nonzero(np.isfinite(values)))
        if broken:
            return Finding(Reason.NOT_FINITE, f"{member.name}: {broken} of {values.size} values are NaN or infinite")
        if self.spec.value_range is None:
            return None
        low, high = self.spec.value_range
        least, most = float(values.min()), float(values.max())
        if least >= low and most <= high:
            return None
        text = f"{member.name}: values {least:.4g}..{most:.4g}, expected {low:.4g}..{high:.4g}"
        return Finding(Reason.OUT_OF_RANGE, text)


def _sum_limits(
    specs: Sequence[TensorSpec], statistics: Mapping[str, InputStatistics], sigma: float, cells: int
) -> tuple[list[float], list[float], list[float]]:
    """Lowest and highest usual channel sums, and calibration means (C each)."""
    low: list[float] = []
    high: list[float] = []
    means: list[float] = []
    for spec in specs:
        known = statistics[spec.name]
        if not len(known.channel_mean) == len(known.channel_std) == _channels(spec):
            raise ArtifactError("the calibration statistics do not fit", where=f"input {spec.name!r}",
                                expected=f"{_channels(spec)} channels", found=len(known.channel_mean))
        least, most = spec.value_range or (known.min or 0.0, known.max or 1.0)
        # A channel that never moved in calibration has no spread: allow it a thousandth of the range.
        margins = [max(sigma * spread, 1e-3 * (most - least)) for spread in known.channel_std]
        low += [(mean - margin) * cells for mean, margin in zip(known.channel_mean, margins, strict=True)]
        high += [(mean + margin) * cells for mean, margin in zip(known.channel_mean, margins, strict=True)]
        means += known.channel_mean
    return low, high, means


class Guards:
    """All guards of one model."""

    def __init__(self, io: IOSpec, statistics: Mapping[str, InputStatistics], config: GuardConfig) -> None:
        self.config = config
        self._structure = [StructureGuard(spec) for spec in io.inputs]
        self._names = {spec.name for spec in io.inputs}
        self.blocks = [Block(specs, statistics, config) for specs in _alike(io.inputs)]
        self.feeds: Arrays = {name: view for block in self.blocks for name, view in block.feeds.items()}

    def structure(self, inputs: object, layouts: Mapping[str, str] | None) -> None:
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
        for guard in self._structure:
            guard.check(inputs[guard.name], layouts.get(guard.name) if layouts else None)

    def take(self, inputs: Arrays) -> Arrays:
        """Copy all inputs; return what to feed, batch axis included. Valid until the next call."""
        for block in self.blocks:
            block.take(inputs)
        return self.feeds

    def fatal(self) -> list[Finding]:
        """Findings after which the model must not see the frame."""
        return [found for block in self.blocks for found in block.fatal()] if self.config.finite_and_range else []

    def doubts(self) -> list[Finding]:
        """Findings about frames that may run: not fresh, not informative, or unlike the calibration set."""
        return [found for block in self.blocks for found in block.doubts()]

    def outputs(self, outputs: Arrays) -> list[Finding]:
        """Findings about what the model gave back."""
        if not self.config.outputs:
            return []
        return [found for name, array in outputs.items() if (found := check_output(name, array)) is not None]


def _alike(specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """Group inputs that can share a buffer; vectors never do."""
    groups: dict[object, list[TensorSpec]] = {}
    for spec in specs:
        grid = spec.shape[1:] if len(spec.shape) > 1 else spec.name
        groups.setdefault((spec.dtype, grid, spec.value_range), []).append(spec)
    return list(groups.values())


def _channels(spec: TensorSpec) -> int:
    """Channels as the calibration statistics count them: a vector is one channel."""
    return spec.shape[0] if len(spec.shape) > 1 else 1


def check_output(name: str, array: Array) -> Finding | None:
    """Find NaN and infinity in an output: its dot product with itself is finite only when every value is."""
    if array.dtype.kind != "f" or math.isfinite(np.vdot(array, array)) or np.isfinite(array).all():
        return None
    return Finding(Reason.NOT_FINITE_OUTPUT, f"{name}: NaN or infinity")

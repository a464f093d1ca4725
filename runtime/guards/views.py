"""What the guards look at in one array.

Making a view costs as much as reading several kilobytes, so the views of an array are kept until another array comes: a
caller that writes every frame into the same array pays for them once. (An array that is kept may not be resized, and
numpy refuses that while it is referenced; its shape and dtype are checked in every frame.)

Legend: C channels of an input, S cells of a channel.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.errors import ArtifactError
from fmdeploy.iospec import TensorSpec

PART_BYTES = 65536  # what one look at the energy may read of a frame
PROBE_ROWS = 8
PROBE_COLUMNS = 256


class Plan:
    """Where to look in one input: fixed by its specification and by which channels moved in calibration."""

    def __init__(self, spec: TensorSpec, channel_std: tuple[float, ...]) -> None:
        self.spec, self.dtype = spec, np.dtype(spec.dtype)
        self.channels = spec.shape[0] if len(spec.shape) > 1 else 1  # a vector is one channel, as in calibration
        self.cells = math.prod(spec.shape) // self.channels
        if len(channel_std) != self.channels:
            raise ArtifactError("the calibration statistics do not fit", where=f"input {spec.name!r}",
                                expected=f"{self.channels} channels", found=len(channel_std))
        self.groups = self._groups()
        self.probe = self._probe(channel_std)
        chosen = np.empty(spec.shape, np.bool_)[self.probe]
        self.probe_channels = chosen.shape[0] if chosen.ndim > 1 else 1
        self.probe_rows = chosen.shape[1] if chosen.ndim > 2 else 1  # of one channel
        self.probe_bytes = chosen.size * self.dtype.itemsize
        self.row_bytes = self.probe_bytes // (self.probe_channels * self.probe_rows)

    def _groups(self) -> list[slice]:
        """Channels whose energy is taken together."""
        count = min(math.ceil(self.channels * self.cells * self.dtype.itemsize / PART_BYTES), self.channels)
        ends = [round(self.channels * number / count) for number in range(count + 1)]
        return [slice(first, last) for first, last in itertools.pairwise(ends)]

    def _probe(self, channel_std: tuple[float, ...]) -> tuple[slice, ...]:
        """A channel of the first half and one of the second half, the liveliest ones; a few rows of each."""
        shape = self.spec.shape
        if len(shape) == 1:
            return (slice(None, PROBE_COLUMNS),)
        half = self.channels // 2
        spread = list(channel_std)
        last = max(range(half, self.channels), key=spread.__getitem__)
        first = max(range(half), key=spread.__getitem__) if half else last
        channels = slice(first, last + 1, max(last - first, 1))
        if len(shape) == 2:
            return (channels, slice(None, PROBE_COLUMNS))
        step = max(shape[1] // PROBE_ROWS, 1)
        left = max((shape[2] - PROBE_COLUMNS) // 2, 0)
        rows = slice(step - 1, step * PROBE_ROWS, step)
        return (channels, rows, slice(left, left + PROBE_COLUMNS), *(slice(0, 1) for _ in shape[3:]))


class Views:
    """One array, as the guards and the model take it."""

    __slots__ = ("bits", "channels", "feed", "parts", "probe", "value")

    def __init__(self, value: Array, plan: Plan, *, bits: bool) -> None:
        """View a C-contiguous array of the planned shape; `bits`: its values are to be read as unsigned integers."""
        self.value = value
        flat = value.reshape(-1)
        self.bits = flat.view(np.uint32) if bits else flat
        self.feed = value[None]
        self.probe = value[plan.probe]
        rows = value.reshape(plan.channels, -1)
        self.channels = list(rows)
        self.parts = [rows[group].reshape(-1) for group in plan.groups]

"""Frozen, repeating, torn and constant pictures of one input.

A full comparison of two frames costs as much as all other guards together, so every frame gives a probe, a few rows of
two channels, whose bytes are kept. Only a probe that repeats leads to a comparison of the whole frames, which decides;
a frame that repeats always repeats its probe.

A torn frame has one half of this frame and one half of the one before it: in memory order (the first channels are new,
the last ones old) or by rows (the upper half of every channel is new). Then one end of the probe moves and the other
stands still. A picture may do that by itself (an empty half, a vehicle that stops), so an end counts only after it has
moved for `LIVE_AFTER` frames without a pause; a sensor with noise always does, a drawing that often stands still never.
For the same reason an end that stands still for longer than `TORN_FRAMES` is taken to be the scene, no torn frame.
"""

from __future__ import annotations

from operator import eq, itemgetter, ne

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.runtime.frame import Finding, Reason
from fmdeploy.runtime.guards.config import GuardConfig
from fmdeploy.runtime.guards.views import Plan, Views

LIVE_AFTER = 512  # frames
TORN_FRAMES = 3


class StreamGuard:
    """Memory of one input's last frames.

    Attributes:
        repeats: For how many frames the input has repeated one of its last two pictures.
    """

    def __init__(self, plan: Plan, config: GuardConfig) -> None:
        self.name, self.repeats = plan.spec.name, 0
        self._channels, self._config = plan.channels, config
        self._last, self._before = b"", b""  # probes of the last two frames
        self._held: list[Array] = []
        ends = _ends(plan)
        # One call cuts all pieces of a probe: the ends, and two that are equal in a constant picture.
        self._cut = itemgetter(*ends, *_neighbours(plan))
        self._last_ends: tuple[bytes, ...] = (b"",) * len(ends)
        self._frames, self._torn_frames = 0, 0
        self._stood_still = [0] * len(ends)  # the last frame in which each end did

    def check(self, views: Views, found: list[Finding]) -> None:
        """Append to `found` what speaks against a frame."""
        probe, last, config = views.probe.tobytes(), self._last, self._config
        pieces = self._cut(probe)
        if (config.low_information and pieces[-1] == pieces[-2] and views.value.size > 1
                and is_constant(views.value, self._channels)):
            found.append(Finding(Reason.LOW_INFORMATION, f"{self.name}: every channel is constant"))
        if not config.frozen_after:
            return
        if probe == last or probe == self._before:
            self._compare(views.value)
            if self.repeats >= config.frozen_after:
                turn = "" if probe == last else ", two pictures in turn"
                found.append(Finding(Reason.FROZEN, f"{self.name}: the same bytes for {self.repeats + 1} frames{turn}"))
        elif self.repeats:
            self._held, self.repeats = [], 0
        known, self._last_ends, self._before, self._last = self._last_ends, pieces[:-2], last, probe
        still, self._frames = self._stood_still, self._frames + 1
        for number, stands in enumerate(map(eq, known, pieces)):
            if stands:
                if self._frames - still[number] > LIVE_AFTER:
                    self._judge_ends(list(map(ne, known, pieces)), found)
                    break
                still[number] = self._frames

    def _compare(self, value: Array) -> None:
        """The probe repeats: compare the bytes with the frames that were held when it first did."""
        if any(np.array_equal(held, value) for held in self._held):
            self.repeats += 1
        else:
            self._held, self.repeats = [*self._held[-1:], value.copy()], 1

    def _judge_ends(self, moved: list[bool], found: list[Finding]) -> None:
        """An end that always moves stood still: torn, if another such end moved."""
        now, still = self._frames, self._stood_still
        live = [now - at > LIVE_AFTER for at in still]
        # The first end is the upper half of an early channel; the others are older where a frame is torn, or newer.
        torn = live[0] and any(lives and moves != moved[0] for lives, moves in zip(live[1:], moved[1:], strict=True))
        self._torn_frames = self._torn_frames + 1 if torn else 0
        if torn and self._torn_frames <= TORN_FRAMES:
            found.append(Finding(Reason.TORN, f"{self.name}: a part of the picture is new, a part is the previous one"))
            return
        for number, moves in enumerate(moved):
            if not moves:
                still[number] = now


def is_constant(value: Array, channels: int) -> bool:
    """Whether every channel holds one value; stops at the first that does not."""
    rows = value.reshape(channels, -1)
    return all(bool((row == row[0]).all()) for row in rows)


def _neighbours(plan: Plan) -> tuple[slice, slice]:
    """Two stretches of the probe that are equal in a constant picture."""
    if plan.probe_rows > 1:
        middle, size = plan.probe_rows // 2 * plan.row_bytes, plan.row_bytes
        return slice(middle - size, middle), slice(middle, middle + size)
    size = plan.dtype.itemsize
    return slice(0, size), slice(size, 2 * size)


def _ends(plan: Plan) -> tuple[slice, ...]:
    """Stretches of the probe: upper half of the first channel, upper and lower half of the last one."""
    size, channels = plan.probe_bytes, plan.probe_channels
    upper = plan.probe_rows // 2 * plan.row_bytes
    if channels > 1 and plan.probe_rows > 1:
        return slice(0, upper), slice(size // 2, size // 2 + upper), slice(size // 2 + upper, size)
    if channels > 1:
        return slice(0, size // 2), slice(size // 2, size)
    if plan.probe_rows > 1:
        return slice(0, upper), slice(upper, size)
    return ()

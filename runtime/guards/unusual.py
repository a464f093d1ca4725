"""Are the inputs like the calibration set? Distances in its standard deviations: a warning or, far away, a refusal.

Two statistics: the mean of a channel (night, fog, swapped colours, a range of 0..255) and the energy, the sum of
squares, of a group of channels (blur and noise, which leave a mean where it was). Reading all channels in every frame
would cost more than all other guards together, so each frame gives one look in turn: at one mean or one energy of one
input. The inputs take turns too: what befalls a whole picture is seen within as many frames as there are inputs, twice
that where only one of the two statistics tells; what befalls one channel waits for its turn, at most `num_looks`
frames. A warning stands until the same look is taken again; what refused a frame is looked at again in the next one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from fmdeploy.errors import ArtifactError
from fmdeploy.runtime.bundle import InputStatistics
from fmdeploy.runtime.frame import Finding, Reason
from fmdeploy.runtime.guards.config import GuardConfig
from fmdeploy.runtime.guards.views import Plan, Views

LEAST_MARGIN = 1e-3  # of the range: a channel that never moved in calibration has no spread


class Look:
    """One statistic of one input, and what calibration saw of it.

    Attributes:
        input: Number of the input.
        slot: Number among the looks at this input.
    """

    def __init__(self, at: int, slot: int, plan: Plan, expected: float, std: float) -> None:
        self.input, self.slot, self.plan, self.name = at, slot, plan, plan.spec.name
        self.expected, self.per_sigma = expected, 1 / std

    def value(self, views: Views) -> float:
        """Return the statistic of a frame."""
        raise NotImplementedError

    def describe(self, views: Views) -> str:
        """Say what was found and what was expected."""
        raise NotImplementedError


class MeanLook(Look):
    """The sum of one channel; its mean, but for the number of cells."""

    def __init__(self, at: int, slot: int, plan: Plan, known: InputStatistics, channel: int, floor: float) -> None:
        super().__init__(at, slot, plan, known.channel_mean[channel] * plan.cells,
                         max(known.channel_std[channel], floor) * plan.cells)
        self.channel = channel
        # Sums of small integer types need a wider accumulator; for floats BLAS wants equal types.
        self._ones = np.ones(plan.cells, plan.dtype if plan.dtype.kind == "f" else np.float64)

    def value(self, views: Views) -> float:
        """Return the sum."""
        return float(views.channels[self.channel].dot(self._ones))

    def describe(self, views: Views) -> str:
        """Name the channel and both means."""
        spec, cells = self.plan.spec, self.plan.cells
        label = spec.channels[self.channel] if len(spec.channels) == self.plan.channels else f"channel {self.channel}"
        return (f"{self.name}: mean of {label} is {self.value(views) / cells:.4g}, "
                f"calibration saw {self.expected / cells:.4g}")


class EnergyLook(Look):
    """The sum of squares of a group of channels."""

    def __init__(self, at: int, slot: int, plan: Plan, known: InputStatistics, number: int, floor: float) -> None:
        group = plan.groups[number]
        # The channels of one picture move together: at worst their spreads add up.
        spread = max(sum(known.energy_std[group]), floor)
        super().__init__(at, slot, plan, sum(known.energy_mean[group]) * plan.cells, spread * plan.cells)
        self.number, self.group = number, group

    def value(self, views: Views) -> float:
        """Return the energy."""
        part = views.parts[self.number]
        return float(part.dot(part))

    def describe(self, views: Views) -> str:
        """Name the channels and both mean squares."""
        count = (self.group.stop - self.group.start) * self.plan.cells
        return (f"{self.name}: mean square of channels {self.group.start} to {self.group.stop - 1} is "
                f"{self.value(views) / count:.4g}, calibration saw {self.expected / count:.4g}")


class UnusualGuard:
    """All looks at all inputs, one a frame."""

    def __init__(self, plans: Sequence[Plan], statistics: Sequence[InputStatistics], config: GuardConfig) -> None:
        self._refuse = config.refuse_sigma or math.inf
        self._sigma, self._every = min(config.unusual_sigma, self._refuse), config.every_channel
        looks = [_looks(at, plan, known, self._sigma)
                 for at, (plan, known) in enumerate(zip(plans, statistics, strict=True))]
        self._looks = [look for turn in itertools.zip_longest(*looks) for look in turn if look is not None]
        self._next = 0
        self._warnings: dict[int, Finding] = {}  # and refusals
        self._refused: set[int] = set()
        self._distances: list[list[float]] = [[0.0] * len(each) for each in looks]
        self._keys = [f"{plan.spec.name}.distance" for plan in plans]
        self.scores: dict[str, float] = {}

    @property
    def num_looks(self) -> int:
        """After how many frames every look was taken."""
        return 1 if self._every else len(self._looks)

    def check(self, views: Sequence[Views | None], found: list[Finding]) -> None:
        """Take the next look, or all of them, and append the warnings and refusals that stand."""
        if self._refused and not self._every:
            for turn in tuple(self._refused):
                self._take(turn, views)
        for _ in range(len(self._looks) if self._every else 1):
            turn = self._next
            self._next = turn + 1 if turn + 1 < len(self._looks) else 0
            self._take(turn, views)
        if self._warnings:
            found.extend(self._warnings.values())

    def _take(self, turn: int, views: Sequence[Views | None]) -> None:
        look = self._looks[turn]
        view = views[look.input]
        distance = 0.0 if view is None else abs(look.value(view) - look.expected) * look.per_sigma
        known = self._distances[look.input]
        known[look.slot] = distance
        self.scores[self._keys[look.input]] = max(known)
        if view is not None and not distance <= self._sigma:
            self._judge(turn, look, view, distance)
        elif self._warnings:
            self._warnings.pop(turn, None)
            self._refused.discard(turn)

    def _judge(self, turn: int, look: Look, view: Views, distance: float) -> None:
        if distance <= self._refuse:
            self._refused.discard(turn)
            self._warnings[turn] = Finding(Reason.UNUSUAL_INPUT, look.describe(view))
            return
        self._refused.add(turn)
        text = f"{look.describe(view)}; {distance:.0f} sigmas off, at most {self._refuse:g} are allowed"
        self._warnings[turn] = Finding(Reason.OUT_OF_DISTRIBUTION, text)


def _looks(at: int, plan: Plan, known: InputStatistics, sigma: float) -> list[Look]:
    """All looks at one input: its means and its energies in turn."""
    if len(known.channel_mean) != plan.channels:
        raise ArtifactError("the calibration statistics do not fit", where=f"input {plan.spec.name!r}",
                            expected=f"{plan.channels} channels", found=len(known.channel_mean))
    least, most = plan.spec.value_range or (known.min or 0.0, known.max or 1.0)
    floor = LEAST_MARGIN * (most - least) / (sigma or 1.0)
    energies = plan.dtype.kind == "f" and len(known.energy_mean) == len(known.energy_std) == plan.channels
    looks: list[Look] = []
    groups = len(plan.groups)
    for channel in range(plan.channels):
        looks.append(MeanLook(at, len(looks), plan, known, channel, floor))
        if energies:  # as often as means, so that neither waits for the other
            looks.append(EnergyLook(at, len(looks), plan, known, channel % groups, floor))
    return looks

"""Guards between the sensors and the model, before quantisation: INT8 turns NaN into plausible numbers.

What a guard costs is memory it reads and code it runs: right behind a model run, the caches hold neither. So:
- every value is read once in every frame, for NaN, infinity and range (`values.py`);
- a few rows are kept in every frame, for frozen, repeating, torn and constant pictures (`stream.py`);
- a part of the channels is read in turn, for the distance from the calibration set (`unusual.py`);
- views of an array are made once, as long as the caller writes into the same one (`views.py`).

An array that owns its memory, in C order, is used in place: the caller must not write to it until `infer` returns.
Everything else (views of shared or driver memory, other orders) is copied once, so that what was checked is what runs;
but for arrays of which the owner of the guards knows that nobody writes to them meanwhile (`Guards.trust`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.budgets import SensorLoss
from fmdeploy.errors import FrameError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.runtime.bundle import Bundle, InputStatistics, OutputStatistics
from fmdeploy.runtime.frame import Finding
from fmdeploy.runtime.guards.config import SAMPLES as SAMPLES
from fmdeploy.runtime.guards.config import GuardConfig as GuardConfig
from fmdeploy.runtime.guards.plausible import output_guards
from fmdeploy.runtime.guards.sensors import SensorModes
from fmdeploy.runtime.guards.stream import StreamGuard
from fmdeploy.runtime.guards.structure import StructureGuard
from fmdeploy.runtime.guards.unusual import UnusualGuard
from fmdeploy.runtime.guards.values import ValueGuard
from fmdeploy.runtime.guards.views import Plan, Views

SHOWN = 8  # names in an error
maximum, vdot = np.maximum.reduce, np.vdot


class InputGuard:
    """The guards of one input, and the views of its last array."""

    def __init__(self, spec: TensorSpec, statistics: InputStatistics, config: GuardConfig) -> None:
        self.name, self.plan = spec.name, Plan(spec, statistics.channel_std)
        self.values, self.stream = ValueGuard(spec), StreamGuard(self.plan, config)
        self.trusted: Sequence[Array] = ()
        self._copy = config.always_copy
        self._views: Views | None = None
        self._buffer: Array | None = None

    def views(self, value: Array) -> Views:
        """Return the views of the array to check and run: the value itself, or a copy of it, C-contiguous."""
        known = self._views
        if known is not None and known.value is value:
            return known
        flags = value.flags
        if (self._copy or not (flags.c_contiguous and flags.owndata)) and all(one is not value for one in self.trusted):
            return self._copied(value)
        self._views = views = Views(value, self.plan, bits=self.values.reads_bits)
        return views

    @property
    def holds_copy(self) -> bool:
        """Whether the views are those of a copy, which every frame makes anew."""
        return self._views is not None and self._views.value is self._buffer

    def _copied(self, value: Array) -> Views:
        if self._buffer is None:
            self._buffer = np.empty(value.shape, value.dtype)
        np.copyto(self._buffer, value)
        known = self._views
        if known is None or known.value is not self._buffer:
            self._views = known = Views(self._buffer, self.plan, bits=self.values.reads_bits)
        return known


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


class Usual(NamedTuple):
    """An array that came before: what must be true of it again, see `Guards._is_usual`."""

    name: str
    value: Array
    bits: Array
    high: int


class Guards:
    """All guards of one model.

    Attributes:
        config: Which of them run.
        inputs: Guards of each input, in the order of the specification.
        output_names: Names of the outputs, in order.
        unusual: The guard of the distance from calibration; None where it is off.
    """

    def __init__(
        self, io: IOSpec, statistics: Mapping[str, InputStatistics], config: GuardConfig, *,
        losses: Mapping[str, SensorLoss] | None = None, outputs: Mapping[str, OutputStatistics] | None = None,
    ) -> None:
        """Prepare the guards.

        Args:
            io: The model's inputs and outputs.
            statistics: What calibration saw of each input.
            config: Which guards run.
            losses: Declared modes without a sensor, by input.
            outputs: What calibration gave at each output; without them outputs have no band.
        """
        self.config = config
        self._structure = {spec.name: StructureGuard(spec) for spec in io.inputs}
        self.inputs = [InputGuard(spec, statistics[spec.name], config) for spec in io.inputs]
        self._names = {spec.name for spec in io.inputs}
        self.output_names = tuple(spec.name for spec in io.outputs)
        self._modes = SensorModes(io, statistics, losses or {})
        plans, known = [guard.plan for guard in self.inputs], [statistics[spec.name] for spec in io.inputs]
        self.unusual = UnusualGuard(plans, known, config) if config.unusual_sigma else None
        self._fed: list[Views | None] = []
        self._last_feeds: Arrays = {}
        self._usual: list[Usual] = []
        self._outputs = output_guards(io.outputs, outputs or {}, config.unusual_sigma) if config.outputs else ()

    @classmethod
    def of(cls, bundle: Bundle, config: GuardConfig | None = None) -> Guards:
        """The guards of a bundle, with all that it declares."""
        return cls(bundle.io, bundle.statistics, config or GuardConfig(), losses=bundle.budgets.sensor_loss,
                   outputs=bundle.output_statistics)

    def trust(self, arrays: Sequence[Array]) -> None:
        """Use these arrays, C-contiguous ones, in place although they are views: nobody writes to them meanwhile."""
        for guard in self.inputs:
            guard.trusted = arrays

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
        if missing or inputs.keys() != self._names:
            self._check_names(inputs, missing)
        if layouts:
            self._check_layouts(inputs, layouts)
            return
        for name, value in inputs.items():
            guard = self._structure[name]
            usual = type(value) is np.ndarray and value.dtype is guard.dtype and value.shape == guard.shape
            if not usual or value.base is not None or guard.ambiguous:
                guard.check(value, None)

    def before(self, inputs: Arrays, missing: Collection[str] = (), *, refused: bool = False) -> Judged:
        """Judge the content of a frame.

        Args:
            inputs: Inputs whose structure was checked.
            missing: Inputs whose sensor is not there.
            refused: The frame must not run, whatever its content.
        """
        findings: list[Finding] = []
        views = self._fed if self._usual and not missing and self._is_usual(inputs) else self._admit(inputs, findings)
        if missing:
            return self._without(views, missing, findings, refused)
        if findings:
            return Judged(None, findings, {})
        scores = self._doubt(views, findings)
        return Judged(None if refused else self._feeds(views), findings, scores)

    def _is_usual(self, inputs: Arrays) -> bool:
        """Whether these are the arrays of last time with values in range: as much as `_admit` asks, in fewer steps."""
        for name, value, bits, high in self._usual:
            if inputs[name] is not value or int(maximum(bits)) > high:
                return False
        return True

    def _without(
        self, views: list[Views | None], missing: Collection[str], findings: list[Finding], refused: bool
    ) -> Judged:
        """Judge a frame that lacks a sensor."""
        fatal = bool(findings)
        filled = self._modes.judge(missing, findings)
        if fatal or filled is None:
            return Judged(None, findings, {})
        scores = self._doubt(views, findings)
        if refused:
            return Judged(None, findings, scores)
        feeds = self._feeds(views) | {name: array[None] for name, array in filled.items()}
        return Judged({guard.name: feeds[guard.name] for guard in self.inputs}, findings, scores)

    def _admit(self, inputs: Arrays, findings: list[Finding]) -> list[Views | None]:
        """View each input, None for one that is missing, and append findings after which the model must not see it."""
        views: list[Views | None] = []
        finite_and_range = self.config.finite_and_range
        for guard in self.inputs:
            value = inputs.get(guard.name)
            if value is None:
                views.append(None)
                continue
            view = guard.views(value)
            views.append(view)
            if finite_and_range and (found := guard.values.check(view)) is not None:
                findings.append(found)
        return views

    def _doubt(self, views: Sequence[Views | None], findings: list[Finding]) -> dict[str, float]:
        """Append what speaks against a frame that may run: not fresh, not informative, unlike the calibration set.

        Returns:
            The distances of the inputs, as far as they are known.
        """
        for guard, view in zip(self.inputs, views, strict=True):
            if view is not None:
                guard.stream.check(view, findings)
        if self.unusual is None:
            return {}
        self.unusual.check(views, findings)
        return self.unusual.scores.copy()

    def _feeds(self, views: list[Views | None]) -> Arrays:
        """Checked inputs as the model takes them: by name, with a batch axis."""
        if views is not self._fed and views != self._fed:  # other arrays than last time
            self._fed, self._usual = views, self._usual_of(views)
            self._last_feeds = {guard.name: view.feed for guard, view in zip(self.inputs, views, strict=True)
                                if view is not None}
        return self._last_feeds

    def _usual_of(self, views: list[Views | None]) -> list[Usual]:
        """What `_is_usual` compares; empty where it cannot: a sensor is missing, a copy is made, no bits are read."""
        rows = [Usual(guard.name, view.value, view.bits, guard.values.high_bits)
                for guard, view in zip(self.inputs, views, strict=True)
                if view is not None and guard.values.high_bits is not None and not guard.holds_copy]
        return rows if self.config.finite_and_range and len(rows) == len(self.inputs) else []

    def outputs(self, outputs: Arrays) -> list[Finding]:
        """Findings about what the model gave back."""
        found: list[Finding] = []
        for name, low, high, guard in self._outputs:
            array = outputs[name]
            if not low <= float(vdot(array, array)) <= high:
                guard.check(array, found)
        return found

    def _check_names(self, inputs: Arrays, missing: Collection[str]) -> None:
        if len(missing) > len(self._names):
            raise FrameError("more inputs are said to be missing than there are", expected=sorted(self._names),
                             found=_some(missing))
        gone = set(missing)
        if unknown := gone - self._names:
            raise FrameError("a missing input is not one of io.json", expected=sorted(self._names),
                             found=_some(unknown))
        if inputs.keys() != self._names - gone:
            what = "a frame has exactly the inputs of io.json" + (" that are not missing" if gone else "")
            raise FrameError(what, expected=sorted(self._names - gone), found=_some(inputs))

    def _check_layouts(self, inputs: Arrays, layouts: Mapping[str, str]) -> None:
        if not layouts.keys() <= self._names:
            raise FrameError("a layout is given for an input that io.json lacks", expected=sorted(self._names),
                             found=_some(layouts))
        for name, value in inputs.items():
            self._structure[name].check(value, layouts.get(name))


def _some(names: Collection[object]) -> list[str]:
    """A few of them, for an error: the caller may have sent a million."""
    few = [str(name)[:40] for name in itertools.islice(names, SHOWN)]
    return sorted(few) if len(names) <= SHOWN else [*few, f"and {len(names) - SHOWN} more"]

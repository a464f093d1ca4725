"""From one calibrated (and perhaps trained) student to its mixed-precision form, with what was measured on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fmdeploy.data.format import Dataset
from fmdeploy.draft import Draft
from fmdeploy.estimate.devices import device
from fmdeploy.models.outputs import predictor
from fmdeploy.models.saved import LoadedModel
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.build import quantizer_name, tracing_example
from fmdeploy.quantize.config import QuantizeConfig
from fmdeploy.quantize.groups import Switchboard
from fmdeploy.quantize.placement import Request
from fmdeploy.quantize.ptq import QuantisedStudent
from fmdeploy.quantize.search import Search, search
from fmdeploy.quantize.sensitivity import Judge, Sensitivity, measure_sensitivity, validation_samples
from fmdeploy.quantize.work import LatencyModel, kernels_of

SENSITIVITY = "sensitivity.json"
SEARCH = "search.json"
SENSITIVITY_SAMPLES = 128  # two passes a layer: enough for a ranking; the search runs its candidates on all samples
WHY = "kept float by the search: the metric drops too far with it in INT8"


@dataclass(frozen=True)
class Mixed:
    """The student that is kept.

    Attributes:
        student: Calibrated, with the chosen layers in float.
        sensitivity: Of the student before layers went back to float; None where nobody asked.
        search: How those layers were chosen; None where nobody asked.
        verified: Relative drop of `student` itself on the samples of the search; None where it is undefined.
    """

    student: QuantisedStudent
    sensitivity: Sensitivity | None = None
    search: Search | None = None
    verified: float | None = None

    @property
    def reached(self) -> bool:
        """Whether the limit holds, for the student that was really built."""
        return self.search is not None and self.verified is not None and self.verified <= self.search.max_drop

    def save(self, draft: Draft) -> None:
        """Write `sensitivity.json` and `search.json`, where there is one."""
        if self.sensitivity is not None:
            draft.write_json(SENSITIVITY, self.sensitivity.to_json())
        if self.search is not None:
            draft.write_json(SEARCH, self.search.to_json())

    def summary(self) -> dict[str, Any]:
        """For `metrics.json`: the noisiest layers, and what the search found."""
        found: dict[str, Any] = {}
        if self.sensitivity is not None:
            rows = self.sensitivity.by_noise()
            found["sensitivity"] = {"samples": self.sensitivity.samples,
                                    "alone_db": {row.name: row.alone.worst_db for row in rows}}
        if self.search is not None:
            found["search"] = {
                "metric": self.search.metric, "max_drop": self.search.max_drop, "reached": self.reached,
                "drop": self.verified, "kept": len(self.search.chosen.keep_float),
                "keep_float": list(self.search.chosen.keep_float),
                "device": self.search.device, "predicted_us": self.search.chosen.microseconds,
                "predicted_us_all_int8": self.search.tried[0].microseconds, "tried": len(self.search.tried),
            }
        return found


def mix(
    config: QuantizeConfig, loaded: LoadedModel, data: Dataset, quantised: QuantisedStudent, request: Request,
    again: Callable[[Request], QuantisedStudent],
) -> Mixed:
    """Measure sensitivity and search, as far as `config` asks for it.

    Args:
        config: `sensitivity`, `max_drop`, `device` and `validation_samples`.
        loaded: the float student: drops are relative to it.
        data: its validation split judges.
        quantised: calibrated, perhaps trained.
        request: what it was placed with.
        again: repeats the PTQ with another request.

    Raises:
        ConfigError: no such device.
        DataError: there is no validation split.
    """
    if config.max_drop is None and not config.sensitivity:
        return Mixed(quantised)
    task, example = loaded.task, tracing_example(loaded.task.io)
    student = predictor(loaded.module, task.io)

    def judge_of(made: QuantisedStudent, placed: Request, count: int) -> Judge:
        board = Switchboard.of(made.module, made.placement, loaded.module, example, placed)
        return Judge(board, task, validation_samples(task, data, count), student)

    count = config.validation_samples
    measured = measure_sensitivity(judge_of(quantised, request, min(count, SENSITIVITY_SAMPLES)))
    if config.max_drop is None:
        return Mixed(quantised, measured)
    judge = judge_of(quantised, request, count)
    kernels = kernels_of(loaded.module, quantised.placement, example)
    found = search(judge, measured, LatencyModel(kernels, device(config.device)), config.max_drop)
    if found.chosen.keep_float and found.chosen.int8:
        request = replace(request, keep_float=(*request.keep_float, *found.chosen.keep_float))
        trained, quantised = quantised, again(request)
        if config.mode != "ptq":
            transplant(trained, quantised)
        quantised = _explained(quantised, found.chosen.keep_float)
        judge = judge_of(quantised, request, count)
    return Mixed(quantised, measured, found, judge.effect(judge.board.names).drop)


def _explained(quantised: QuantisedStudent, kept: tuple[str, ...]) -> QuantisedStudent:
    floats = tuple(replace(row, why=WHY) if row.name in kept else row for row in quantised.placement.floats)
    return replace(quantised, placement=replace(quantised.placement, floats=floats))


def transplant(trained: QuantisedStudent, fresh: QuantisedStudent) -> None:
    """Put the weights of `trained` into `fresh`, and the ranges of the quantizers that both have, in place."""
    weights = trained.module.state_dict()
    own = {name: weights[name] for name in fresh.module.state_dict() if name in weights and not _is_range(name)}
    fresh.module.load_state_dict(own, strict=False)
    theirs, ranges = modelopt.ranges(trained.module), modelopt.ranges(fresh.module)
    standing = {tensor: row.quantizer for row in trained.placement.activations for tensor in row.tensors}
    for row in fresh.placement.activations:
        if row.tensors[0] in standing:
            source = quantizer_name(trained.placement, standing[row.tensors[0]])
            ranges[quantizer_name(fresh.placement, row.quantizer)] = theirs[source]
    ranges |= {name: theirs[name] for name in ranges if name.endswith(".weight_quantizer")}
    modelopt.set_ranges(fresh.module, ranges)


def _is_range(name: str) -> bool:
    return name.endswith("._amax")

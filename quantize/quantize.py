"""`quantize`: from a STUDENT to a QUANTIZED, by calibration alone (ptq) or with some training (qat, qad)."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from typing import Any

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.command import command
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import DataError, GateError
from fmdeploy.estimate.devices import device
from fmdeploy.evaluate.sqnr import finite_db, sqnr_db
from fmdeploy.manifest import Kind, ancestors_learnt_from
from fmdeploy.models.outputs import predictor
from fmdeploy.models.saved import RECIPE, WEIGHTS, LoadedModel, load_model, require_heads
from fmdeploy.quantize import calibrate
from fmdeploy.quantize.config import QuantizeConfig
from fmdeploy.quantize.layers import layer_sqnr
from fmdeploy.quantize.mixed import Mixed, mix
from fmdeploy.quantize.placement import Request
from fmdeploy.quantize.placementfile import read_placement
from fmdeploy.quantize.ptq import QuantisedStudent, ptq
from fmdeploy.quantize.qad import School, school
from fmdeploy.quantize.qat import imitation, qat, validation
from fmdeploy.quantize.scores import carry_over, judge, relative_drop
from fmdeploy.quantize.store import save_quantized
from fmdeploy.training.device import resolve_precision, together
from fmdeploy.training.loop import Timing


@dataclass(frozen=True)
class Sources:
    """What is quantised, and on what."""

    student: Artifact
    data: Dataset
    loaded: LoadedModel
    request: Request
    school: School | None
    """Where it goes on learning, in mode qad."""

    def inputs(self) -> dict[str, Artifact]:
        """Roles of the artifacts, for the manifest."""
        return {"student": self.student, "data": self.data.artifact,
                **(self.school.sources.inputs() if self.school is not None else {})}


@command(QuantizeConfig)
def quantize(config: QuantizeConfig) -> Artifact:
    """Quantise a student to INT8: fold, place, calibrate; train where the mode is qat or qad; judge.

    With `max_drop` the cheapest layers are kept in float so that the metric drops no further on the validation split.

    Raises:
        ArtifactError: an input is not what it should be.
        DataError: the samples cannot calibrate the student, or belong to another dataset.
        ConfigError: an unknown module, device or teacher, or no loss for qat.
        LeakageError: the teacher was trained on what the student is judged on.
        GateError: `max_drop` was not reached. The best that was found is written all the same.
    """
    config = config.model_copy(update={"precision": resolve_precision(config.precision)})
    sources = _open(config)
    made = produce(
        config.out, Kind.QUANTIZED, stage="quantize", config=config, inputs=sources.inputs(),
        build=lambda draft: _build(draft, config, sources), resumable=config.mode != "ptq",
    )
    _require_drop(made)
    return made


def _open(config: QuantizeConfig) -> Sources:
    if config.max_drop is not None:
        device(config.device)  # an unknown one is refused before the work, not after
    student, data = open_artifact(config.student, Kind.STUDENT), open_dataset(config.data)
    require_same_data(student, data)
    loaded = require_heads(load_model(student), config.student)
    taught = school(student, config, data=config.data, teacher=config.teacher, features=config.features,
                    task=loaded.recipe.task, teacher_data=config.teacher_data) if config.teacher is not None else None
    return Sources(student, data, loaded, _request(config), taught)


def require_same_data(student: Artifact, data: Dataset) -> None:
    """Refuse a dataset that the student was not trained on: its training split may hold the student's test frames.

    Raises:
        DataError: names both digests.
    """
    known = {parent.digest for parent in ancestors_learnt_from(student.inputs) if parent.kind is Kind.DATASET}
    if known and data.digest not in known:
        raise DataError("is not the dataset that the student was trained on", where=data.artifact.root,
                        expected=" or ".join(sorted(d[:12] for d in known)), found=data.digest[:12])


def _build(draft: Draft, config: QuantizeConfig, sources: Sources) -> None:
    with together():
        task = sources.loaded.task
        calibration_set = calibrate.draw(task, sources.data, count=config.calibration_samples, seed=config.seed,
                                         split=config.calibration_split)
        request, quantised = sources.request, _ptq(config, sources, calibration_set, sources.request)
        timing = None
        if config.mode != "ptq":
            quantised, timing = _train(draft, config, sources, quantised)
            draft.note(training=timing.as_note())
        if draft.is_main:
            mixed = mix(config, sources.loaded, sources.data, quantised, request,
                        lambda other: _ptq(config, sources, calibration_set, other))
            mixed.save(draft)
            save_quantized(draft, mixed.student.module, mixed.student.placement, mixed.student.calibration)
            for name in (RECIPE, WEIGHTS):  # the float student travels along: export writes its FP32 variant from it
                shutil.copyfile(sources.student.path(name), draft.path(name))
            draft.write_json("metrics.json", _metrics(draft, config, sources, mixed, calibration_set, timing))


def _request(config: QuantizeConfig) -> Request:
    table = read_placement(config.placement) if config.placement else None
    return Request(config.keep_float, config.quantise_heads, table)


def _ptq(
    config: QuantizeConfig, sources: Sources, calibration_set: calibrate.CalibrationSet, request: Request
) -> QuantisedStudent:
    return ptq(sources.loaded.module, sources.loaded.task.io, calibration_set, request=request,
               calibrator=config.calibrator, smooth=config.smooth, clip_weights=config.clip_weights)


def _train(
    draft: Draft, config: QuantizeConfig, sources: Sources, quantised: QuantisedStudent
) -> tuple[QuantisedStudent, Timing]:
    task, data = sources.loaded.task, sources.data
    if sources.school is not None:
        lesson = sources.school.lesson(quantised)
    else:
        lesson = imitation(sources.loaded.module, task, data, config, alpha_student=config.alpha_student,
                           alpha_labels=config.alpha_labels)
    judged = validation(task, data, every=config.validate_every, patience=config.patience,
                        count=config.validation_samples)
    return qat(quantised, lesson, config, folder=draft.path(f"work/{config.mode}"), log=draft.path("log.jsonl"),
               learn_scales=config.learn_scales, judged=judged, title=config.mode)


def _metrics(
    draft: Draft, config: QuantizeConfig, sources: Sources, mixed: Mixed, calibration_set: calibrate.CalibrationSet,
    timing: Timing | None,
) -> dict[str, Any]:
    task, data, quantised = sources.loaded.task, sources.data, mixed.student
    names = [spec.name for spec in task.io.inputs]
    elsewhere = sources.school.sources.elsewhere if sources.school is not None else {}
    float_student, int8 = predictor(sources.loaded.module, task.io), predictor(quantised.module, task.io)
    before = carry_over(draft, sources.student, task, data, float_student)
    after = judge(draft, int8, task, data, examples=True)
    wanted, found = float_student(calibration_set.inputs), int8(calibration_set.inputs)
    return {
        "mode": config.mode,
        **after,
        "student": before,
        "drop": relative_drop(before, after, task.metrics()[0]),
        "sqnr_db": {name: finite_db(sqnr_db(wanted[name], found[name])) for name in wanted},
        "layer_sqnr_db": layer_sqnr(quantised.module, quantised.placement, calibration_set, names),
        **_summary(quantised),
        **mixed.summary(),
        **({"training": _training(timing)} if timing else {}),
        **({"teacher_data": elsewhere} if elsewhere else {}),
    }


def _summary(quantised: QuantisedStudent) -> dict[str, Any]:
    """Counts of what was quantised, and what was not and why."""
    placement, calibration = quantised.placement, quantised.calibration
    return {
        "calibration": {"samples": len(calibration.samples), "digest": calibration.digest,
                        "calibrator": calibration.calibrator},
        "placement": {
            "method": placement.method,
            "reason": placement.reason or "",
            "weights": len(placement.weights),
            "activations": len(placement.activations),
            "adds": len(placement.adds),
            "float": {row.name: row.why for row in placement.floats},
        },
    }


def _training(timing: Timing) -> dict[str, Any]:
    """Which state stayed, and every look at the validation split (steps done, score)."""
    judged = [[step, score if math.isfinite(score) else None] for step, score in timing.judged]
    return {"best_step": timing.best_step, "validation": judged}


def _require_drop(made: Artifact) -> None:
    """Refuse a result that misses the limit it was asked for; it stays on disk.

    Raises:
        GateError: says what the best one was.
    """
    found = made.json("metrics.json").get("search")
    if found is not None and not found["reached"]:
        raise GateError(f"no network with a layer in INT8 keeps {found['metric']} within the limit on the validation "
                        "split; the best one was written", where=made.root, expected=f"drop <= {found['max_drop']:g}",
                        found=found["drop"], fix="Train it on the grid with --mode qad, or allow a larger --max-drop")

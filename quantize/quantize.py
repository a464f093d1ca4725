"""`quantize`: from a STUDENT to a QUANTIZED, by calibration alone (ptq) or with some training (qat)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.command import command
from fmdeploy.config import InputPath, OutputPath
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import DataError
from fmdeploy.evaluate.sqnr import finite_db, sqnr_db
from fmdeploy.manifest import Kind, Parent
from fmdeploy.models.outputs import predictor
from fmdeploy.models.saved import RECIPE, WEIGHTS, LoadedModel, load_model
from fmdeploy.quantize import calibrate
from fmdeploy.quantize.ptq import QuantisedStudent, ptq
from fmdeploy.quantize.qat import qat
from fmdeploy.quantize.scores import carry_over, judge, relative_drop
from fmdeploy.quantize.store import save_quantized
from fmdeploy.training.config import Precision, TrainingConfig
from fmdeploy.training.device import resolve_precision, together


class QuantizeConfig(TrainingConfig):
    """How the student is quantised. The training options matter for `qat` only."""

    student: InputPath = Field(description="STUDENT")
    data: InputPath = Field(description="DATASET that the student was trained on")
    out: OutputPath = Field(description="Where the QUANTIZED is written")
    mode: Literal["ptq", "qat"] = Field("ptq", description="calibrate only, or train with fake quantisation too")
    calibration_samples: int = Field(256, ge=1, description="samples that show the ranges")
    calibration_split: str = Field("train", description="must be 'train'; the others are for judging")
    keep_float: tuple[str, ...] = Field((), description="modules to leave in float, such as stem.0.0")
    quantise_heads: bool = Field(False, description="quantise the last layers too (their outputs stay float)")
    alpha_student: float = Field(1.0, ge=0, description="qat: weight of imitating the float student")
    alpha_labels: float = Field(0.0, ge=0, description="qat: weight of the labels of the whole training split")
    steps: int = Field(200, ge=1, description="qat: optimiser steps")
    lr: float = Field(1e-4, gt=0, description="qat: peak learning rate")
    precision: Precision = Field("fp32", description="qat: arithmetic of the fake-quantised network")


@command(QuantizeConfig)
def quantize(config: QuantizeConfig) -> Artifact:
    """Quantise a student to INT8: fold, place, calibrate, and train where the mode is qat.

    Raises:
        ArtifactError: an input is not what it should be.
        DataError: the samples cannot calibrate the student, or belong to another dataset.
        ConfigError: an unknown module to keep float, or no loss for qat.
    """
    config = config.model_copy(update={"precision": resolve_precision(config.precision)})
    student, data = open_artifact(config.student, Kind.STUDENT), open_dataset(config.data)
    require_same_data(student, data)
    return produce(
        config.out, Kind.QUANTIZED, stage="quantize", config=config,
        inputs={"student": student, "data": data.artifact},
        build=lambda draft: _build(draft, config, student, data), resumable=config.mode == "qat",
    )


def require_same_data(student: Artifact, data: Dataset) -> None:
    """Refuse a dataset that the student was not trained on: its training split may hold the student's test frames.

    Raises:
        DataError: names both digests.
    """
    known = {parent.digest for parent in _ancestors(student.inputs) if parent.kind is Kind.DATASET}
    if known and data.digest not in known:
        raise DataError("is not the dataset that the student was trained on", where=data.artifact.root,
                        expected=" or ".join(sorted(d[:12] for d in known)), found=data.digest[:12])


def _ancestors(inputs: Mapping[str, Parent]) -> list[Parent]:
    return [found for parent in inputs.values() for found in (parent, *_ancestors(parent.inputs))]


def _build(draft: Draft, config: QuantizeConfig, student: Artifact, data: Dataset) -> None:
    with together():
        loaded = load_model(student)
        calibration_set = calibrate.draw(loaded.task, data, count=config.calibration_samples, seed=config.seed,
                                         split=config.calibration_split)
        quantised = ptq(loaded.module, loaded.task.io, calibration_set, keep_float=config.keep_float,
                        quantise_heads=config.quantise_heads)
        if config.mode == "qat":
            timing = qat(quantised, loaded.module, loaded.task, data, config, alpha_student=config.alpha_student,
                         alpha_labels=config.alpha_labels, folder=draft.path("work/qat"),
                         log=draft.path("log.jsonl"))
            draft.note(training=timing.as_note())
        if draft.is_main:
            save_quantized(draft, quantised.module, quantised.placement, quantised.calibration)
            for name in (RECIPE, WEIGHTS):  # the float student travels along: export writes its FP32 variant from it
                shutil.copyfile(student.path(name), draft.path(name))
            metrics = _metrics(draft, config, student, data, loaded, quantised, calibration_set)
            draft.write_json("metrics.json", metrics)


def _metrics(
    draft: Draft, config: QuantizeConfig, student: Artifact, data: Dataset, loaded: LoadedModel,
    quantised: QuantisedStudent, calibration_set: calibrate.CalibrationSet,
) -> dict[str, Any]:
    task = loaded.task
    float_student, int8 = predictor(loaded.module, task.io), predictor(quantised.module, task.io)
    before = carry_over(draft, student, task, data, float_student)
    after = judge(draft, int8, task, data, examples=True)
    wanted, found = float_student(calibration_set.inputs), int8(calibration_set.inputs)
    return {
        "mode": config.mode,
        **after,
        "student": before,
        "drop": relative_drop(before, after, task.metrics()[0].name),
        "sqnr_db": {name: finite_db(sqnr_db(wanted[name], found[name])) for name in wanted},
        **summary(quantised),
    }


def summary(quantised: QuantisedStudent) -> dict[str, Any]:
    """Counts of what was quantised and what was not."""
    placement, calibration = quantised.placement, quantised.calibration
    return {
        "calibration": {"samples": len(calibration.samples), "digest": calibration.digest},
        "placement": {
            "method": placement.method,
            "reason": placement.reason or "",
            "weights": len(placement.weights),
            "activations": len(placement.activations),
            "adds": len(placement.adds),
            "float": [f"{row.node}: {row.why}" for row in placement.floats],
        },
    }

"""From a STUDENT or QUANTIZED to a BUNDLE, the product that goes to the device."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.budgets import AccuracyBudget, Budgets, TargetBudget, read_budgets
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError, DataError
from fmdeploy.export.card import model_card
from fmdeploy.export.config import ExportConfig
from fmdeploy.export.golden import write_golden
from fmdeploy.export.parity import Parity, compare, outputs_of, require_parity, subset
from fmdeploy.export.variants import Variants, write_variants
from fmdeploy.manifest import Kind
from fmdeploy.models.outputs import predictor
from fmdeploy.models.saved import RECIPE, load_model
from fmdeploy.progress import say
from fmdeploy.quantize.calibrate import SPLIT, Calibration, CalibrationSet, draw, input_statistics, redraw
from fmdeploy.quantize.ptq import ptq
from fmdeploy.quantize.quantize import require_same_data
from fmdeploy.quantize.scores import carry_over, held_out_splits
from fmdeploy.quantize.store import load_quantized
from fmdeploy.task import Samples, Task


@dataclass(frozen=True)
class Source:
    """What is exported: the float student, its INT8 form, and the samples that calibrated it."""

    artifact: Artifact
    task: Task
    data: Dataset
    student: nn.Module
    quantised: nn.Module | None
    by_modules: bool
    calibration: Calibration
    calibration_set: CalibrationSet


def write_bundle(config: ExportConfig) -> Artifact:
    """Write ONNX variants, prove them against torch, and bundle them with golden vectors and budgets.

    Raises:
        ArtifactError: an input is not what it should be.
        ConfigError: a budget on a metric that the task does not have.
        DataError: the dataset is another one, or cannot calibrate.
        ModelFileError: the student cannot be exported.
        GateError: a file does not compute what the student does.
    """
    if config.model is None or config.data is None or config.out is None:
        raise ConfigError("a bundle needs a model, the data it was trained on, and a place", where="export",
                          expected="--model, --data and --out")
    model, data = open_artifact(config.model, Kind.STUDENT, Kind.QUANTIZED), open_dataset(config.data)
    require_same_data(model, data)
    if model.kind is Kind.QUANTIZED and config.keep_float:
        raise ConfigError("keep_float is decided when quantising", where=config.model,
                          fix="Give it to fmdeploy quantize")
    return produce(config.out, Kind.BUNDLE, stage="export", config=config,
                   inputs={"model": model, "data": data.artifact},
                   build=lambda draft: _build(draft, config, _open(config, model, data)))


def _open(config: ExportConfig, artifact: Artifact, data: Dataset) -> Source:
    loaded = load_model(artifact)
    task = loaded.task
    if artifact.kind is Kind.QUANTIZED:
        stored = load_quantized(artifact)
        calibration_set = redraw(task, data, stored.calibration)
        module = stored.module if config.int8 else None
        return Source(artifact, task, data, loaded.module, module, stored.placement.method == "modules",
                      stored.calibration, calibration_set)
    calibration_set = draw(task, data, count=config.calibration_samples, seed=config.seed)
    if not config.int8:
        seen = Calibration(calibration_set.data, calibration_set.digest, config.seed, calibration_set.ids, {})
        return Source(artifact, task, data, loaded.module, None, False, seen, calibration_set)
    made = ptq(loaded.module, task.io, calibration_set, keep_float=config.keep_float)
    return Source(artifact, task, data, loaded.module, made.module, made.placement.method == "modules",
                  made.calibration, calibration_set)


def _build(draft: Draft, config: ExportConfig, source: Source) -> None:
    task = source.task
    budgets = _budgets(config, task)
    variants = write_variants(draft.root, task.io, source.student, source.quantised,
                              opset=config.opset, cpu=config.cpu)
    metrics = _metrics(draft, config, source, variants)
    golden = subset(task.samples(source.data, SPLIT), config.golden_samples)
    write_golden(draft, task, golden, {name: variants.predictor(name) for name in variants.names},
                 saturating=variants.saturating)
    draft.write_text("budgets.toml", budgets.to_toml())
    draft.write_json("calibration.json", source.calibration.to_json())
    draft.write_json("input_statistics.json", {"inputs": input_statistics(source.calibration_set.inputs)})
    draft.write_json("io.json", task.io.model_dump(mode="json"))
    shutil.copyfile(source.artifact.path(RECIPE), draft.path(RECIPE))
    draft.write_json("metrics.json", metrics)
    draft.write_text("card.md", model_card(source.artifact, task, metrics))


def _metrics(draft: Draft, config: ExportConfig, source: Source, variants: Variants) -> dict[str, Any]:
    task, data = source.task, source.data
    splits = held_out_splits(data)
    if not splits:
        raise DataError("has no held-out split to compare the files on", where=data.artifact.root,
                        expected="test or val", found=", ".join(data.splits))
    samples = subset(task.samples(data, splits[-1]), config.parity_samples)
    rows = variants.describe()
    for parity in _parities(source, variants, samples):
        say(str(parity))
        require_parity(parity)
        rows[parity.variant]["parity"] = parity.to_json()
    student = carry_over(draft, source.artifact, task, data, predictor(source.student, task.io))
    return {"metric": task.metrics()[0].name, "parity_split": splits[-1], "parity_samples": len(samples),
            "variants": rows, "student": student}


def _parities(source: Source, variants: Variants, samples: Samples) -> Iterator[Parity]:
    task = source.task
    said = {name: outputs_of(variants.predictor(name), samples, task) for name in variants.names}
    yield compare("fp32", said["fp32"], "torch", outputs_of(predictor(source.student, task.io), samples, task), task)
    if source.quantised is not None:
        fake = outputs_of(predictor(source.quantised, task.io), samples, task)
        yield compare("int8", said["int8"], "torch fake-quant", fake, task, by_modules=source.by_modules)
        yield compare("int8-cpu", said["int8-cpu"], "int8", said["int8"], task)


def _budgets(config: ExportConfig, task: Task) -> Budgets:
    names = [metric.name for metric in task.metrics()]
    if config.budgets is None:
        accuracy = AccuracyBudget(metric=names[0], max_drop_vs_teacher=0.08, max_drop_vs_fp32=0.01,
                                  max_slice_drop=0.03)
        return Budgets(accuracy=accuracy, target={"cpu": TargetBudget(p50_ms=10.0, p99_ms=40.0, peak_mib=400.0)})
    budgets = read_budgets(config.budgets)
    if budgets.accuracy.metric not in names:
        raise ConfigError("the budget is on a metric that the task does not have", where=config.budgets,
                          expected=" or ".join(names), found=budgets.accuracy.metric)
    return budgets



"""From a STUDENT or QUANTIZED to a BUNDLE, the product that goes to the device."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.budgets import AccuracyBudget, Budgets, TargetBudget, read_budgets
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError, DataError
from fmdeploy.export.card import model_card
from fmdeploy.export.config import ExportConfig
from fmdeploy.export.fp16 import QDQ_OPSET
from fmdeploy.export.golden import write_golden
from fmdeploy.export.parity import Outputs, Parity, Predict, compare, outputs_of, require_parity
from fmdeploy.export.tensorrt.compilecheck import wanted_version
from fmdeploy.export.torchtrt import write_torch_engine
from fmdeploy.export.variants import QDQ, Variants, write_variants
from fmdeploy.export.verification import FILE, verify_tensorrt
from fmdeploy.manifest import Kind
from fmdeploy.models.outputs import predictor
from fmdeploy.models.saved import RECIPE, load_model, require_heads
from fmdeploy.progress import say
from fmdeploy.quantize.calibrate import SPLIT, Calibration, CalibrationSet, draw, input_statistics, redraw
from fmdeploy.quantize.placement import Placement, Request
from fmdeploy.quantize.ptq import ptq
from fmdeploy.quantize.quantize import require_same_data
from fmdeploy.quantize.samples import output_statistics
from fmdeploy.quantize.scores import carry_over, held_out_splits
from fmdeploy.quantize.store import load_quantized
from fmdeploy.runtime.onnxcheck.checks import check_model, remarks
from fmdeploy.runtime.onnxcheck.interface import Declared
from fmdeploy.subset import subset
from fmdeploy.task import Samples, Task

CHUNK = 64  # samples in one pass of the student


@dataclass(frozen=True)
class Source:
    """What is exported: the float student, its INT8 form, and the samples that calibrated it."""

    artifact: Artifact
    task: Task
    data: Dataset
    student: nn.Module
    quantised: nn.Module | None
    placement: Placement | None
    calibration: Calibration
    calibration_set: CalibrationSet

    @property
    def by_modules(self) -> bool:
        """Whether the student was quantised module by module."""
        return self.placement is not None and self.placement.method == "modules"


def write_bundle(config: ExportConfig) -> Artifact:
    """Write ONNX variants, prove them against torch, and bundle them with golden vectors and budgets.

    With `backend` "torch-tensorrt" an ENGINE for this machine's GPU is written instead, see `torchtrt.py`.

    Raises:
        ArtifactError: an input is not what it should be.
        ConfigError: a budget on a metric that the task does not have.
        DataError: the dataset is another one, or cannot calibrate.
        ModelFileError: the student cannot be exported.
        GateError: a file does not compute what the student does.
    """
    if config.backend == "torch-tensorrt":
        return write_torch_engine(config)
    if config.model is None or config.data is None or config.out is None:
        raise ConfigError("a bundle needs a model, the data it was trained on, and a place", where="export",
                          expected="--model, --data and --out")
    if config.int8 and config.rest == "fp16" and config.opset < QDQ_OPSET:
        raise ConfigError("INT8 with FP16 around it needs a newer operator set", where="--opset",
                          expected=f">= {QDQ_OPSET}", found=config.opset, fix="Or give --rest fp32")
    model, data = open_artifact(config.model, Kind.STUDENT, Kind.QUANTIZED), open_dataset(config.data)
    require_same_data(model, data)
    if model.kind is Kind.QUANTIZED and config.keep_float:
        raise ConfigError("keep_float is decided when quantising", where=config.model,
                          fix="Give it to fmdeploy quantize")
    return produce(config.out, Kind.BUNDLE, stage="export", config=config,
                   inputs={"model": model, "data": data.artifact},
                   build=lambda draft: _build(draft, config, _open(config, model, data)))


def _open(config: ExportConfig, artifact: Artifact, data: Dataset) -> Source:
    loaded = require_heads(load_model(artifact), artifact.root)
    task = loaded.task
    if artifact.kind is Kind.QUANTIZED:
        stored = load_quantized(artifact)
        calibration_set = redraw(task, data, stored.calibration)
        module, placement = (stored.module, stored.placement) if config.int8 else (None, None)
        return Source(artifact, task, data, loaded.module, module, placement, stored.calibration, calibration_set)
    calibration_set = draw(task, data, count=config.calibration_samples, seed=config.seed)
    if not config.int8:
        seen = Calibration(calibration_set.data, calibration_set.digest, config.seed, calibration_set.ids, {})
        return Source(artifact, task, data, loaded.module, None, None, seen, calibration_set)
    made = ptq(loaded.module, task.io, calibration_set, request=Request(keep_float=config.keep_float))
    return Source(artifact, task, data, loaded.module, made.module, made.placement, made.calibration, calibration_set)


def _build(draft: Draft, config: ExportConfig, source: Source) -> None:
    task = source.task
    budgets = _budgets(config, task)
    variants = write_variants(draft.root, task.io, source.student, source.quantised, opset=config.opset,
                              inputs=source.calibration_set.inputs, cpu=config.cpu, rest=config.rest)
    checked = _verify(draft, config, source, variants)
    metrics = _metrics(draft, config, source, variants)
    _require_admissible(task, variants, metrics, checked)
    golden = subset(task.samples(source.data, SPLIT), config.golden_samples)
    write_golden(draft, task, golden, {name: variants.predictor(name) for name in variants.names},
                 references=_references(source), saturating=variants.saturating)
    draft.write_text("budgets.toml", budgets.to_toml())
    draft.write_json("calibration.json", source.calibration.to_json())
    draft.write_json("input_statistics.json", _statistics(source))
    draft.write_json("io.json", task.io.model_dump(mode="json"))
    shutil.copyfile(source.artifact.path(RECIPE), draft.path(RECIPE))
    draft.write_json("metrics.json", metrics)
    draft.write_text("card.md", model_card(source.artifact, task, metrics, checked))


def _verify(draft: Draft, config: ExportConfig, source: Source, variants: Variants) -> dict[str, Any] | None:
    """Compile the TensorRT files where that was asked for or can be done; what `tensorrt.json` holds."""
    if wanted_version(config.verify_tensorrt) is None:
        say("the TensorRT files are not compiled here: tensorrt-rtx is not installed, or the check was left out")
        return None
    placed = [row.module for row in source.placement.weights] if source.placement is not None else []
    checked = verify_tensorrt(variants, placed)
    draft.write_json(FILE, checked)
    return checked


def _statistics(source: Source) -> dict[str, Any]:
    """What calibration saw of the inputs, and what the float student made of it: the runtime's guards ask for both."""
    inputs, predict = source.calibration_set.inputs, predictor(source.student, source.task.io)
    count = len(next(iter(inputs.values())))
    parts = [predict({name: array[at:at + CHUNK] for name, array in inputs.items()}) for at in range(0, count, CHUNK)]
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {"inputs": input_statistics(inputs), "outputs": output_statistics(outputs)}


def _require_admissible(
    task: Task, variants: Variants, metrics: dict[str, Any], checked: dict[str, Any] | None
) -> None:
    """Put every file through the device's own checks: what it would refuse is not worth shipping; say what is odd."""
    for name in variants.names:
        path, placed = variants.path(name), checked["required_int8"] if checked and name == "int8" else ()
        declared = Declared(name.startswith("int8"), metrics["variants"][name]["quantize_pairs"], tuple(placed))
        for remark in remarks(check_model(path.read_bytes(), task.io, where=path, declared=declared)):
            say(f"{name}: {remark}")


def _references(source: Source) -> dict[str, Predict]:
    """What the files were made from: torch, float and fake-quantised."""
    modules = {"fp32": source.student, "int8": source.quantised}
    return {name: predictor(module, source.task.io) for name, module in modules.items() if module is not None}


def _metrics(draft: Draft, config: ExportConfig, source: Source, variants: Variants) -> dict[str, Any]:
    task, data = source.task, source.data
    splits = held_out_splits(data)
    if not splits:
        raise DataError("has no held-out split to compare the files on", where=data.artifact.root,
                        expected="test or val", found=", ".join(data.splits))
    samples = subset(task.samples(data, splits[-1]), config.parity_samples)
    rows = variants.describe()
    graph = None
    for parity in _parities(source, variants, samples):
        say(str(parity))
        require_parity(parity)
        if parity.variant == QDQ:
            graph = parity.to_json()
        else:
            rows[parity.variant]["parity"] = parity.to_json()
    student = carry_over(draft, source.artifact, task, data, predictor(source.student, task.io))
    return {"metric": task.metrics()[0].name, "parity_split": splits[-1], "parity_samples": len(samples),
            "variants": rows, "qdq_graph": graph, "student": student}


def _parities(source: Source, variants: Variants, samples: Samples) -> Iterator[Parity]:
    task = source.task

    def said(variant: str) -> Outputs:
        return outputs_of(variants.predictor(variant), samples, task)

    torch_says = {name: outputs_of(predict, samples, task) for name, predict in _references(source).items()}
    yield compare("fp32", said("fp32"), "torch", torch_says["fp32"], task)
    yield compare("fp16", said("fp16"), "torch", torch_says["fp32"], task)
    if source.quantised is not None:
        graph = said(QDQ)
        yield compare(QDQ, graph, "torch fake-quant", torch_says["int8"], task, by_modules=source.by_modules)
        yield compare("int8", said("int8"), "torch fake-quant", torch_says["int8"], task)
        yield compare("int8-cpu", said("int8-cpu"), QDQ, graph, task)


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



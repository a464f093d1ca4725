"""STUDENT → QUANTIZED → BUNDLE → Runtime, and what is refused on the way."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.budgets import read_budgets
from fmdeploy.data.format import open_dataset
from fmdeploy.distill.distill import distill
from fmdeploy.errors import ArtifactError, ConfigError, DataError, FmdeployError, InputError, MissingError
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.evaluate.sqnr import sqnr_db
from fmdeploy.export.export import export
from fmdeploy.export.formats import file_name
from fmdeploy.iospec import IOSpec
from fmdeploy.manifest import Kind
from fmdeploy.models import predictor
from fmdeploy.quantize.quantize import quantize
from fmdeploy.quantize.store import load_quantized
from fmdeploy.runtime.backends.tensorrt_api import installed
from fmdeploy.runtime.session import Runtime
from support.training_data import STUDENT, TEACHER, write_scenes

FOREIGN = """
import torch
from torch import nn

class Plain(nn.Module):
    def __init__(self, branching):
        super().__init__()
        self.branching = branching
        self.enter = nn.Conv2d(20, 16, 3, 2, 1)
        self.inner = nn.Conv2d(16, 16, 3, 1, 1)
        self.leave = nn.ConvTranspose2d(16, 5, 2, 2)
        self.scene = nn.Linear(16, 8)

    def forward(self, lidar, camera):
        x = torch.relu(self.enter(torch.cat([lidar, camera], 1)))
        if self.branching and x.mean() > -1:
            x = x * 1.0
        x = torch.relu(x + self.inner(x))
        return self.leave(x), self.scene(x.mean((2, 3)))

def traceable() -> nn.Module:
    return Plain(False)

def branching() -> nn.Module:
    return Plain(True)
"""
SIZES = {"stem_width": 16, "width": 16}
SHORT: dict[str, Any] = {**STUDENT, **SIZES, "steps": 12}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `teacher`, `student`, `quantized` and `bundle`."""
    from fmdeploy.teacher.train import train

    folder = tmp_path_factory.mktemp("chain")
    write_scenes(folder / "data")
    train(data=folder / "data", out=folder / "teacher", steps=4, **TEACHER)
    distill(data=folder / "data", teacher=folder / "teacher", out=folder / "student", labels=1.0, **SHORT)
    quantize(student=folder / "student", data=folder / "data", out=folder / "quantized", calibration_samples=12)
    export(model=folder / "quantized", data=folder / "data", out=folder / "bundle", golden_samples=3)
    return folder


def _sha(artifact: Artifact, variant: str) -> str:
    return hashlib.sha256(artifact.path(file_name(variant)).read_bytes()).hexdigest()


def test_quantized_carries_tables_evaluations_and_numbers(home: Path) -> None:
    found = open_artifact(home / "quantized", Kind.QUANTIZED)
    metrics = found.json("metrics.json")
    assert metrics["mode"] == "ptq"
    assert metrics["calibration"]["samples"] == 12
    assert (metrics["placement"]["method"], metrics["placement"]["adds"]) == ("fx", 5)
    assert min(metrics["sqnr_db"].values()) > 20
    assert set(metrics["drop"]) == {"test", "val"}
    for name in ("evaluation", "validation", "student_evaluation", "teacher_evaluation"):
        assert len(Evaluation.load(found, name)) > 0
    assert not [name for name in found.manifest.files if name.endswith((".pt", ".pth", ".pkl", ".bin"))]


def test_restored_student_scores_what_the_stage_said(home: Path) -> None:
    found = open_artifact(home / "quantized")
    restored = load_quantized(found)
    from fmdeploy.evaluate.evaluation import evaluate

    task, data = restored.task, open_dataset(home / "data")
    again = evaluate(predictor(restored.module, task.io), task.samples(data, "test"), task.metrics())
    stored = Evaluation.load(found, "evaluation")
    for name, rows in stored.stats.items():
        assert np.array_equal(rows, again.stats[name])


def test_bundle_holds_every_promised_file(home: Path) -> None:
    bundle = open_artifact(home / "bundle", Kind.BUNDLE)
    assert set(bundle.manifest.files) >= {
        "model.fp32.onnx", "model.fp16.onnx", "model.int8.onnx", "model.int8-cpu.onnx", "golden.safetensors", "golden.json",
        "budgets.toml",
        "calibration.json", "input_statistics.json", "io.json", "card.md", "metrics.json",
        "teacher_evaluation.json", "teacher_evaluation.safetensors", "student_evaluation.json",
    }
    metrics = bundle.json("metrics.json")
    fused = metrics["variants"]["int8-cpu"]["fused"]
    assert (fused["int8_convs"], fused["int8_adds"], fused["float_adds"]) == (11, 5, 0)
    for variant, floor in (("fp32", 60), ("fp16", 45), ("int8", 25), ("int8-cpu", 30)):
        parity = metrics["variants"][variant]["parity"]
        assert min(parity["sqnr_db"].values()) >= floor
        assert min(parity["cosine"].values()) > 0.998
    assert min(metrics["qdq_graph"]["sqnr_db"].values()) >= 40
    io = IOSpec.model_validate(bundle.json("io.json"))
    assert io.inputs[0].name == "lidar"
    known = bundle.json("input_statistics.json")
    assert known["outputs"].keys() == {spec.name for spec in io.outputs}
    assert all(len(known["inputs"][spec.name]["energy_std"]) == spec.shape[0] for spec in io.inputs)
    assert read_budgets(bundle.path("budgets.toml")).accuracy.metric == "iou"
    assert "| model.int8-cpu.onnx |" in bundle.path("card.md").read_text()


def test_golden_vectors_hold_the_answers_of_torch_and_of_every_file(home: Path) -> None:
    golden = open_artifact(home / "bundle").tensors("golden.safetensors")
    sources = {"reference.fp32", "reference.int8", *(f"output.{v}" for v in ("fp32", "fp16", "int8", "int8-cpu"))}
    assert {name.rpartition(".")[0] for name in golden if name.endswith(".bev")} == {"target", *sources}
    for ours, theirs in (("output.fp32", "reference.fp32"), ("output.int8", "reference.int8")):
        assert sqnr_db(golden[f"{theirs}.bev"], golden[f"{ours}.bev"]) > 25


@pytest.mark.skipif(not installed("tensorrt-rtx"), reason="needs the extra [trt-rtx]")
def test_bundle_tells_what_the_tensorrt_compiler_made_of_it(home: Path) -> None:
    found = open_artifact(home / "bundle").json("tensorrt.json")
    assert len(found["required_int8"]) == found["files"]["int8"]["counts"]["INT8"] == 11
    assert "sm_87" in found["not_proven"]
    layer = next(row for row in found["files"]["int8"]["layers"] if row["compute"])
    assert layer["precision"] == "INT8"
    assert (layer["inputs"], layer["weights"][0], layer["nodes"][0][0]) == (["INT8"], "INT8", "/")
    assert "tensorrt-rtx 1.7" in (home / "bundle/card.md").read_text()


def test_runtime_answers_with_the_golden_outputs(home: Path) -> None:
    bundle = open_artifact(home / "bundle")
    golden = bundle.tensors("golden.safetensors")
    runtime = Runtime(home / "bundle")
    frame = {name: golden[f"input.{name}"][1] for name in ("lidar", "camera")}
    found = runtime.infer(frame)
    for name in ("bev", "scene"):
        assert sqnr_db(golden[f"output.int8-cpu.{name}"][1], np.asarray(found.outputs[name]).reshape(
            golden[f"output.int8-cpu.{name}"][1].shape)) > 35


def test_student_exports_to_the_same_files_as_through_quantize(home: Path, tmp_path: Path) -> None:
    direct = export(model=home / "student", data=home / "data", out=tmp_path / "b", calibration_samples=12)
    through = open_artifact(home / "bundle")
    assert [_sha(direct, v) for v in ("fp32", "int8", "int8-cpu")] == [_sha(through, v) for v in ("fp32", "int8", "int8-cpu")]


def test_same_input_gives_the_same_digest(home: Path, tmp_path: Path) -> None:
    again = quantize(student=home / "student", data=home / "data", out=tmp_path / "q", calibration_samples=12)
    assert again.digest == open_artifact(home / "quantized").digest
    bundle = export(model=tmp_path / "q", data=home / "data", out=tmp_path / "b", golden_samples=3)
    assert bundle.digest == open_artifact(home / "bundle").digest


def test_float_only_bundle(home: Path, tmp_path: Path) -> None:
    bundle = export(model=home / "student", data=home / "data", out=tmp_path / "b", int8=False, calibration_samples=5)
    assert not bundle.has("model.int8.onnx")
    assert bundle.json("calibration.json")["ranges"] == {}


def test_bundle_for_arm_cores_is_signed_and_computes_the_same(home: Path, tmp_path: Path) -> None:
    bundle = export(model=home / "quantized", data=home / "data", out=tmp_path / "b", cpu="arm64", parity_samples=2,
                    golden_samples=2)
    through = open_artifact(home / "bundle")
    assert _sha(bundle, "int8") == _sha(through, "int8")
    assert _sha(bundle, "int8-cpu") != _sha(through, "int8-cpu")
    assert min(bundle.json("metrics.json")["variants"]["int8-cpu"]["parity"]["sqnr_db"].values()) > 30


def test_qat_through_the_stage_beats_nothing_but_runs_and_exports(home: Path, tmp_path: Path) -> None:
    found = quantize(student=home / "student", data=home / "data", out=tmp_path / "q", mode="qat", steps=8, batch=4,
                     calibration_samples=12)
    assert found.json("metrics.json")["mode"] == "qat"
    assert not any(name.startswith("work/") for name in found.manifest.files)
    bundle = export(model=tmp_path / "q", data=home / "data", out=tmp_path / "b")
    assert _sha(bundle, "fp32") == _sha(open_artifact(home / "bundle"), "fp32"), "fp32 is the float student, not QAT's"
    same = _sha(bundle, "int8") == _sha(open_artifact(home / "bundle"), "int8")
    best = found.json("metrics.json")["training"]["best_step"]
    assert same == (best == 0), "the best state on the validation split stays, which may be the untrained one"


@pytest.mark.parametrize("which", ["traceable", "branching"])
def test_module_that_never_heard_of_fmdeploy(
    which: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign_net.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {key: value for key, value in SHORT.items() if key not in SIZES} | {"student": f"foreign_net:{which}", "steps": 4}
    distill(data=home / "data", out=tmp_path / "s", labels=1.0, **options)
    found = quantize(student=tmp_path / "s", data=home / "data", out=tmp_path / "q", calibration_samples=6)
    placement = found.json("placement.json")
    if which == "traceable":
        assert (placement["method"], placement["adds"]) == ("fx", ["add"])
    else:
        assert placement["method"] == "modules"
        assert "foreign_net.py:16 `if self.branching and x.mean() > -1:`" in placement["reason"]
    bundle = export(model=tmp_path / "q", data=home / "data", out=tmp_path / "b")
    assert min(bundle.json("metrics.json")["variants"]["int8"]["parity"]["sqnr_db"].values()) >= 40


def _refusals(home: Path, tmp: Path) -> dict[str, tuple[Any, dict[str, Any], type[FmdeployError], str]]:
    student, data, out = home / "student", home / "data", tmp / "out"
    write_scenes(tmp / "other", seed=5)
    (tmp / "budgets.toml").write_text('[accuracy]\nmetric = "beauty"\n')
    given = {"student": student, "data": data, "out": out}
    exported = {"model": student, "data": data, "out": out}
    return {
        "another split": (quantize, {**given, "calibration_split": "test"}, DataError, "must come from the training split"),
        "another dataset": (quantize, {**given, "data": tmp / "other"}, DataError, "not the dataset that the student was"),
        "no dataset": (quantize, {**given, "data": tmp / "none"}, ArtifactError, "no such artifact"),
        "foreign kind": (quantize, {**given, "student": data}, ArtifactError, "another kind"),
        "unknown layer": (quantize, {**given, "keep_float": ["nope"]}, ConfigError, "no conv, linear or sum is called 'nope'"),
        "unknown key": (quantize, {**given, "colour": 1}, ConfigError, "unknown key 'colour'"),
        "no samples": (quantize, {**given, "calibration_samples": 0}, ConfigError, "calibration_samples"),
        "no loss": (quantize, {**given, "mode": "qat", "alpha_student": 0.0, "batch": 4}, ConfigError, "QAT needs a loss"),
        "export another dataset": (export, {**exported, "data": tmp / "other"}, DataError, "not the dataset"),
        "export wrong metric": (export, {**exported, "budgets": tmp / "budgets.toml"}, ConfigError, "beauty"),
        "export keep float": (export, {**exported, "model": home / "quantized", "keep_float": ["x"]}, ConfigError, "decided"),
        "export bad opset": (export, {**exported, "opset": 13}, ConfigError, "opset"),
        "export a dataset": (export, {**exported, "model": data}, ArtifactError, "another kind"),
    }


def test_bad_input_is_one_line_with_exit_code_two_and_leaves_nothing(home: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()}
    for name, (stage, options, kind, text) in _refusals(home, tmp_path).items():
        with pytest.raises(kind) as caught:
            stage(**options)
        message = str(caught.value)
        assert text in message, f"{name}: {message}"
        assert "\n" not in message
        assert isinstance(caught.value, InputError)
        assert caught.value.exit_code == 2
        assert not (tmp_path / "out").exists(), name
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()} == before


def test_altered_quantized_is_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "quantized", tmp_path / "q")
    raw = bytearray((tmp_path / "q" / "quantized.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "q" / "quantized.safetensors").write_bytes(raw)
    with pytest.raises(ArtifactError, match="sha256 differs"):
        export(model=tmp_path / "q", data=home / "data", out=tmp_path / "out")


def test_missing_modelopt_says_what_to_install(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fmdeploy.quantize import modelopt

    modelopt.load.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingError, match="huggingface_hub") as caught:
        quantize(student=home / "student", data=home / "data", out=tmp_path / "q", calibration_samples=2)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "q").exists()

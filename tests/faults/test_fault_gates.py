"""Gates that must not be passed by accident (faults.md 4.9): real students, real checks, exit codes as CI sees them."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.draft import Draft
from fmdeploy.evaluate.evaluation import data_key, evaluate
from fmdeploy.task import Task, load_task
from support.bundles import Arrays, budgets, io_spec, make_bundle, run_model
from support.checkable import calibrate
from support.fdti import Fdti
from support.processes import FMDEPLOY
from support.report_artifacts import dataset
from support.toy_task import ToyTask, make_dataset

TESTS = Path(__file__).parents[1]
TOY = ("--task", "support.toy_task:ToyTask")
Floats = np.ndarray[Any, np.dtype[np.float32]]


def linear_model(weights: Floats, bias: Floats, size: int = 64) -> bytes:
    """A student that sees one cell at a time: `bev` logits from weights (5, 20) and bias (5,); `scene` knows nothing."""
    spec = io_spec(size)
    nodes = [helper.make_node("Concat", ["lidar", "camera"], ["both"], axis=1),
             helper.make_node("Conv", ["both", "w", "b"], ["bev"], kernel_shape=[1, 1]),
             helper.make_node("GlobalAveragePool", ["both"], ["pooled"]),
             helper.make_node("Flatten", ["pooled"], ["flat"]),
             helper.make_node("Gemm", ["flat", "w2"], ["scene"], transB=1)]
    graph = helper.make_graph(
        nodes, "linear",
        [helper.make_tensor_value_info(s.name, TensorProto.FLOAT, [1, *s.shape]) for s in spec.inputs],
        [helper.make_tensor_value_info(s.name, TensorProto.FLOAT, [1, *s.shape]) for s in spec.outputs],
        [numpy_helper.from_array(weights[:, :, None, None].astype(np.float32), "w"),
         numpy_helper.from_array(bias.astype(np.float32), "b"),
         numpy_helper.from_array(np.full((8, 20), 0.01, np.float32), "w2")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    raw: bytes = model.SerializeToString()
    return raw


def train(task: Task, data: Dataset, *, shuffled: bool) -> bytes:
    """Least squares on the training split, to the labels of each cell or to those of another one."""
    samples = task.samples(data, "train")
    inputs, targets = samples.batch(np.arange(len(samples)))
    seen = np.concatenate([inputs["lidar"], inputs["camera"]], axis=1).transpose(0, 2, 3, 1).reshape(-1, 20)
    labels = targets["bev"].transpose(0, 2, 3, 1).reshape(-1, 5).astype(np.float32)
    if shuffled:
        labels = labels[np.random.default_rng(0).permutation(len(labels))]
    design = np.concatenate([seen, np.ones((len(seen), 1), np.float32)], axis=1)
    solution = np.linalg.lstsq(design.T @ design, design.T @ (8 * labels - 4), rcond=None)[0].T
    return linear_model(solution[:, :20], solution[:, 20])


@dataclass(frozen=True)
class Students:
    """A dataset, and two bundles from the same training: one on the right labels, which is the teacher, too."""

    data: Path
    honest: Path
    shuffled: Path


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> Students:
    root = tmp_path_factory.mktemp("students")
    data = open_dataset(dataset(root / "data").root)
    task = load_task("bev-occupancy")
    honest, shuffled = train(task, data, shuffled=False), train(task, data, shuffled=True)
    limits = budgets(max_drop_vs_teacher=0.1, min_groups=4)

    def contents(draft: Draft) -> None:
        draft.write_json("io.json", task.io.model_dump(mode="json"))
        draft.write_json("model.json", {"task": "bev-occupancy"})
        calibrate(draft, task, data.artifact.root)
        evaluate(lambda inputs: run_model(honest, inputs), task.samples(data, "test"), task.metrics(),
                 data=data_key(data.digest, "test")).save(draft, "teacher_evaluation")

    made = {name: make_bundle(root / name, size=64, models={"fp32": model}, limits=limits, change=contents).root
            for name, model in (("honest", honest), ("shuffled", shuffled))}
    return Students(data.artifact.root, made["honest"], made["shuffled"])


def check(bundle: Path, data: Path, out: Path, *more: object) -> tuple[int, str, dict[str, Any]]:
    """Exit code, standard error and JSON of a check as CI runs it."""
    done = subprocess.run([*FMDEPLOY, "check", bundle, "--data", data, "--out", out, "--runs", "100", "--json", *map(str, more)],
                          capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(TESTS)})
    return done.returncode, done.stderr, json.loads(done.stdout) if done.stdout else {}


def row(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(gate for gate in found["gates"] if gate["name"] == name and gate["slice"] is None)


VS_TEACHER = "fp32 iou drop vs teacher"


def test_F40_control_a_student_of_the_right_labels_passes(students: Students, tmp_path: Path) -> None:
    code, _, found = check(students.honest, students.data, tmp_path / "c")
    assert code == 0, found
    assert (row(found, VS_TEACHER)["result"], row(found, VS_TEACHER)["value"]) == ("pass", 0.0)
    assert found["values"]["fp32"]["iou"] > 0.3, "it learned something"


def test_F40_a_student_of_shuffled_labels_fails(students: Students, tmp_path: Path, fdti: Fdti) -> None:
    with fdti.detecting("check of a student with shuffled labels"):
        code, _, found = check(students.shuffled, students.data, tmp_path / "c")
    assert code == 1
    gate = row(found, VS_TEACHER)
    assert gate["result"] == "fail"
    assert gate["value"] > 0.9
    assert not found["passed"]


def test_F40_a_set_that_is_too_small_passes_nobody(students: Students, tmp_path: Path) -> None:
    limits = tmp_path / "b.toml"
    limits.write_text(budgets(max_drop_vs_teacher=0.1, min_groups=4, min_samples=57).to_toml())
    code, _, found = check(students.honest, students.data, tmp_path / "c", "--budgets", limits)
    assert (code, row(found, VS_TEACHER)["result"]) == (1, "not measured")
    assert row(found, VS_TEACHER)["reason"] == "56 samples, 57 needed"


def _toy(tmp_path: Path, *, empty_labels: bool = False, samples: int = 96) -> Path:
    known = ToyTask().samples(open_dataset(make_dataset(tmp_path / "toy").root), "test")
    inputs, targets = known.batch(np.arange(96))
    if empty_labels:
        targets["bev"][:] = 0
    splits = {"train": np.arange(samples, 96), "test": np.arange(samples)}
    arrays: Arrays = {**inputs, **targets}
    write_arrays(tmp_path / "d", arrays, splits, groups=np.arange(96) // 4)
    return tmp_path / "d"


@pytest.fixture
def silent(tmp_path: Path) -> Path:
    """A bundle with two equal models that never see anything."""
    model = linear_model(np.full((5, 20), 0.01, np.float32), np.full(5, -9, np.float32), size=16)
    return make_bundle(tmp_path / "silent", models={"fp32": model, "int8-cpu": model}).root


def test_F41_a_metric_that_is_nan_is_not_measured(silent: Path, tmp_path: Path, fdti: Fdti) -> None:
    """Labels without a vehicle and a model that sees none: 0/0, which is below every limit in the wrong comparison."""
    with fdti.detecting("check with a metric of 0/0"):
        code, _, found = check(silent, _toy(tmp_path, empty_labels=True), tmp_path / "c", *TOY)
    gate = row(found, "int8-cpu iou drop vs fp32")
    assert (code, gate["result"], gate["value"]) == (1, "not measured", None)
    assert found["values"]["fp32"]["iou"] is None


def test_F41_no_samples_at_all(silent: Path, tmp_path: Path, fdti: Fdti) -> None:
    data = _toy(tmp_path, samples=0)
    with fdti.detecting("check of an empty split"):
        code, error, found = check(silent, data, tmp_path / "c", *TOY)
    assert (code, found) == (1, {})
    assert "nothing can be measured: the split has no samples" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "c").exists()


def test_F41_control_models_and_labels_with_vehicles_are_measured(tmp_path: Path) -> None:
    code, _, found = check(make_bundle(tmp_path / "b").root, _toy(tmp_path), tmp_path / "c", *TOY)
    assert row(found, "int8-cpu iou drop vs fp32")["result"] == "pass"
    assert found["values"]["fp32"]["iou"] > 0.5
    assert code == 0

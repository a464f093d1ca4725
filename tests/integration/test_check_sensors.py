"""`check` measures every declared mode without a sensor; what was not measured is not passed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.artifact import open_artifact
from fmdeploy.budgets import SensorLoss
from fmdeploy.data.format import open_dataset
from fmdeploy.evaluate.evaluation import Evaluation, evaluate
from fmdeploy.runtime.check.check import check
from support.bundles import Arrays, budgets, fp32_model, make_bundle, run_model
from support.toy_task import ToyTask, make_dataset

TASK = "support.toy_task:ToyTask"
CAMERA, LIDAR = "fp32 iou drop without camera", "fp32 iou drop without lidar"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "data").root


def checked(out: Path, data: Path, declared: dict[str, float], **asked: float) -> tuple[dict[str, Any], int]:
    """Rows by name and the exit code of a check of the FP32 tier."""
    def modes(drops: dict[str, float]) -> dict[str, SensorLoss]:
        return {name: SensorLoss(fill="zeros", max_drop=drop) for name, drop in drops.items()}

    bundle = make_bundle(out / "bundle", limits=budgets().model_copy(update={"sensor_loss": modes(declared)}))
    limits = out / "budgets.toml"
    limits.write_text(budgets().model_copy(update={"sensor_loss": modes(asked)}).to_toml())
    found = check(bundle=bundle.root, data=data, out=out / "check", task=TASK, runs=100, tiers=("fp32",),
                  budgets=limits if asked else None)
    return {row["name"]: row for row in found.data["gates"]}, found.exit_code


def test_declared_modes_are_measured_and_gated(data: Path, tmp_path: Path) -> None:
    rows, code = checked(tmp_path, data, {"camera": 0.99, "lidar": 0.0})
    assert rows[CAMERA]["result"] == "pass"
    assert rows[LIDAR]["result"] == "fail", "the toy network sees with its lidar"
    assert code == 1
    task, metric = ToyTask(), ToyTask().metrics()[0]

    def blind(inputs: Arrays) -> Arrays:
        return run_model(fp32_model(), {**inputs, "lidar": np.zeros_like(inputs["lidar"])})

    samples = task.samples(open_dataset(data), "test")
    bare = evaluate(blind, samples, [metric]).value(metric)
    whole = Evaluation.load(open_artifact(tmp_path / "check"), "evaluation.fp32").value(metric)
    assert rows[LIDAR]["value"] == pytest.approx((whole - bare) / whole)
    low, high = rows[LIDAR]["interval"]
    assert low <= rows[LIDAR]["value"] <= high
    assert rows[LIDAR]["n_samples"] == len(samples)


def test_mode_that_the_bundle_lacks_is_not_measured(data: Path, tmp_path: Path) -> None:
    rows, code = checked(tmp_path, data, {}, camera=0.99)
    assert (rows[CAMERA]["result"], rows[CAMERA]["reason"]) == ("not measured", "the bundle does not declare this mode")
    assert code == 1


def test_mode_of_the_bundle_is_measured_whatever_is_asked_for(data: Path, tmp_path: Path) -> None:
    rows, _ = checked(tmp_path, data, {"lidar": 0.0}, camera=0.99)
    assert rows[LIDAR]["result"] == "fail"
    assert rows[CAMERA]["result"] == "not measured"


def test_control_without_modes_there_are_no_rows(data: Path, tmp_path: Path) -> None:
    rows, code = checked(tmp_path, data, {})
    assert not [name for name in rows if "without" in name]
    assert code == 0, rows

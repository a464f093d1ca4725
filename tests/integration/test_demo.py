"""The contract of `fmdeploy demo`: which files, which numbers, and that they agree with each other."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fmdeploy.artifact import open_artifact
from fmdeploy.manifest import Kind

KINDS = {"data": Kind.DATASET, "teacher": Kind.TEACHER, "features": Kind.FEATURES, "student": Kind.STUDENT,
         "student_scratch": Kind.STUDENT, "quantized": Kind.QUANTIZED, "bundle": Kind.BUNDLE, "check": Kind.CHECK,
         "trouble": Kind.EVALUATION}


@pytest.fixture(scope="module")
def summary(pipeline: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((pipeline / "summary.json").read_text())
    return found


def test_every_stage_left_its_artifact(pipeline: Path) -> None:
    for name, kind in KINDS.items():
        assert open_artifact(pipeline / name, kind).kind is kind
    assert {p.name for p in pipeline.iterdir()} == {*KINDS, "budgets.toml", "report.html", "summary.json"}


def test_the_lineage_leads_from_the_bundle_back_to_the_data(pipeline: Path) -> None:
    model = open_artifact(pipeline / "bundle").inputs["model"]
    student = model.inputs["student"]
    assert student.digest == open_artifact(pipeline / "student").digest
    assert student.inputs["teacher"].inputs["data"].digest == open_artifact(pipeline / "data").digest
    assert student.inputs["features"].digest == open_artifact(pipeline / "features").digest


def test_the_summary_holds_what_was_promised(summary: dict[str, Any]) -> None:
    for model in ("teacher", "student", "student_scratch", "int8", "int8_cpu"):
        assert 0 <= summary[model]["iou"] <= 1
    for number in ("retention", "int8_drop", "worst_slice_drop"):
        assert math.isfinite(summary[number])
    for number in ("fp32_ms", "int8_cpu_ms", "speedup"):
        assert summary["latency"][number] > 0
    assert math.isfinite(summary["latency"]["runtime_overhead_us"])
    assert summary["retention"] == pytest.approx(summary["student"]["iou"] / summary["teacher"]["iou"])
    assert set(summary["gates"][0]) >= {"name", "result", "value", "limit", "interval"}
    stages = {"record", "teacher", "cache", "distill", "scratch", "quantize", "export", "check", "report"}
    assert stages <= set(summary["seconds"])
    assert set(summary["baselines"]) == {"copy lidar", "copy lidar | camera"}


def test_the_numbers_agree_with_the_artifacts(summary: dict[str, Any], pipeline: Path) -> None:
    checked = open_artifact(pipeline / "check").json("check.json")
    assert summary["int8_cpu"]["iou"] == checked["values"]["int8-cpu"]["iou"]
    assert summary["int8_drop"] == pytest.approx(1 - summary["int8_cpu"]["iou"] / checked["values"]["fp32"]["iou"])
    assert checked["values"]["fp32"]["iou"] == pytest.approx(summary["student"]["iou"], abs=2e-3)
    assert summary["int8"]["iou"] == pytest.approx(summary["int8_cpu"]["iou"], abs=5e-3)
    params = open_artifact(pipeline / "student").json("metrics.json")["params"]
    assert summary["student"]["params"] == params == summary["student_scratch"]["params"]


def test_the_students_saw_a_tenth_of_the_labels(summary: dict[str, Any]) -> None:
    for name in ("student", "student_scratch"):
        labels = summary[name]["labels"]
        assert 0 < labels["samples"] <= 0.15 * labels["of"]
    assert summary["teacher"]["labels"]["samples"] == summary["teacher"]["labels"]["of"]


def test_calibration_came_from_the_training_split(pipeline: Path, fmdeploy: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = fmdeploy("data", "audit", pipeline / "data", "--against", pipeline / "bundle",
                            "--against", pipeline / "check", "--json")
    assert (code, json.loads(out)) == (0, [])


def test_the_report_stands_alone(pipeline: Path) -> None:
    html = (pipeline / "report.html").read_text()
    assert len(html) < 3 * 2**20
    assert not re.search(r"(src|href)=[\"'](https?:)?//", html)
    assert "<script src" not in html
    for text in ("lidar", "teacher", "fog", open_artifact(pipeline / "bundle").digest[:12]):
        assert text in html


def test_a_second_run_does_nothing_again(
    pipeline: Path, fmdeploy: Callable[..., tuple[int, str, str]]
) -> None:
    before = (pipeline / "data" / "manifest.json").stat().st_mtime_ns
    code, _, err = fmdeploy("data", "record", "--simulations", 40, "--out", pipeline / "data")
    assert (code, (pipeline / "data" / "manifest.json").stat().st_mtime_ns) == (0, before)
    assert "up to date" in err

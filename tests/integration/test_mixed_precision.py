"""`quantize --max-drop` through the stage: planted layers stay in float, and a limit that cannot be kept says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fmdeploy.artifact import open_artifact
from fmdeploy.cli import main
from fmdeploy.config import StageConfig
from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.draft import produce
from fmdeploy.errors import ConfigError, GateError
from fmdeploy.evaluate.report import report
from fmdeploy.manifest import Kind
from fmdeploy.models.saved import save_model
from fmdeploy.quantize.quantize import quantize
from fmdeploy.quantize.store import load_quantized
from support.planted import CONVS, Chain, labelled, plant

TASK = "support.planted:Planted"


class _Planted(StageConfig):
    layers: tuple[str, ...]
    task: str = TASK


def _student(home: Path, layers: tuple[str, ...]) -> Path:
    net = Chain()
    samples = labelled(net)
    order = np.arange(len(samples))
    data = write_arrays(home / "data", {"image": samples.images, "label": samples.labels.astype(np.int64)},
                        {"train": order[:24], "val": order[24:72], "test": order[72:]}, groups=order // 4, name="planted")
    for layer in layers:
        plant(net, layer)
    return produce(
        home / "student", Kind.STUDENT, stage="planting", config=_Planted(layers=layers), inputs={"data": data},
        build=lambda draft: save_model(draft, net, task=TASK, role="student", name="chain", options={}),
    ).root


def test_planted_layers_stay_in_float_and_the_report_shows_why(tmp_path: Path) -> None:
    student, data = _student(tmp_path, ("third", "fourth")), tmp_path / "data"
    plain = quantize(student=student, data=data, out=tmp_path / "plain", calibration_samples=8)
    assert plain.json("metrics.json")["drop"]["val"] > 0.2
    assert not plain.has("search.json")
    made = quantize(student=student, data=data, out=tmp_path / "mixed", calibration_samples=8, max_drop=0.02)
    metrics, found = made.json("metrics.json"), made.json("search.json")
    assert found["chosen"]["keep_float"] == ["third", "fourth"]
    assert metrics["search"]["reached"] is True
    assert metrics["drop"]["val"] == 0 == metrics["search"]["drop"]
    assert metrics["drop"]["test"] == 0
    assert metrics["placement"]["float"] == {
        "third": "kept float by the search: the metric drops too far with it in INT8",
        "fourth": "kept float by the search: the metric drops too far with it in INT8", "head": "output head"}
    assert set(metrics["layer_sqnr_db"]) == {"first", "second"}
    assert min(metrics["layer_sqnr_db"].values()) > 20
    assert {row["name"] for row in made.json("sensitivity.json")["rows"]} == set(CONVS)
    assert [row.module for row in load_quantized(made).placement.weights] == ["first", "second"]
    report(artifacts=[tmp_path / "mixed", data], out=tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Kept in float for the metric: third, fourth." in page
    assert 'id="pareto-' in page
    assert 'id="sensitivity-' in page


def test_a_limit_that_cannot_be_kept_fails_and_loses_nothing(tmp_path: Path) -> None:
    student, data = _student(tmp_path, CONVS), tmp_path / "data"
    options = {"student": student, "data": data, "out": tmp_path / "q", "calibration_samples": 8, "max_drop": 0.01}
    for _ in range(2):  # a second run finds the artifact and fails alike
        with pytest.raises(GateError, match="no network with a layer in INT8 keeps accuracy within the limit"):
            quantize(**options)
    made = open_artifact(tmp_path / "q", Kind.QUANTIZED)
    assert made.json("metrics.json")["search"]["reached"] is False
    assert load_quantized(made).placement.weights


def _exit_code(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


def test_an_unknown_device_is_refused_before_any_work(tmp_path: Path) -> None:
    student = _student(tmp_path, ())
    with pytest.raises(ConfigError, match="unknown device 'toaster'"):
        quantize(student=student, data=tmp_path / "data", out=tmp_path / "q", max_drop=0.01, device="toaster")
    assert not (tmp_path / "q").exists()


def test_the_command_says_what_was_measured_and_leaves_with_the_right_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["quantize", "--student", str(_student(tmp_path, CONVS)), "--data", str(tmp_path / "data"),
               "--calibration-samples", "8", "--calibrator", "entropy"]
    assert _exit_code([*options, "--out", str(tmp_path / "a"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert found["calibration"]["calibrator"] == "entropy"
    assert found["student"]["test"]["accuracy"] == 1.0 > found["test"]["accuracy"]
    assert set(found["layer_sqnr_db"]) == set(CONVS)
    assert found["placement"]["float"] == {"head": "output head"}
    assert _exit_code([*options, "--out", str(tmp_path / "b"), "--max-drop", "0.01"]) == 1
    assert "the best one was written" in capsys.readouterr().err
    assert open_artifact(tmp_path / "b", Kind.QUANTIZED).has("search.json")

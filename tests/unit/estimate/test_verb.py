"""The verb `estimate`: its contract, bundles, a user's own measurements, and one clear line for every fault."""

from __future__ import annotations

import json
from dataclasses import replace
from math import isclose
from pathlib import Path
from typing import Any

import pytest
from onnx import helper

from fmdeploy import cli
from fmdeploy.estimate.constants import Efficiency
from fmdeploy.estimate.devices import device
from fmdeploy.estimate.estimate import estimate
from fmdeploy.estimate.fromonnx import read_work
from fmdeploy.estimate.networks.resnet import resnet
from fmdeploy.estimate.networks.unet import unet
from fmdeploy.estimate.networks.vit import vit
from fmdeploy.estimate.roofline import predict
from fmdeploy.estimate.work import PRECISIONS
from fmdeploy.onnxfile.graph import save_model
from support.bundles import make_bundle
from support.onnxgraphs import graph_of


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small networks in a folder."""
    folder = tmp_path_factory.mktemp("models")
    for name, net in (("r18", resnet(18)), ("vit", vit("tiny")), ("unet", unet())):
        save_model(net.model(), folder / f"{name}.onnx")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["estimate", *map(str, arguments)])
    text = capsys.readouterr()
    code = stop.value.code
    assert isinstance(code, int)
    return code, text.out, text.err


def test_json_contract(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, models / "r18.onnx", "--device", "orin-nano-super", "--precision", "int8", "--batch", "8",
                         "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["low_ms"] < found["p50_ms"] < found["high_ms"]
    assert isclose(sum(layer["ms"] for layer in found["layers"]), found["p50_ms"], rel_tol=1e-9)
    assert {"name", "kind", "precision", "ms", "bound", "macs"} <= set(found["layers"][0])
    assert (found["device"], found["power_mode"], found["precision"], found["batch"]) == (
        "orin-nano-super", "MAXN_SUPER", "int8", 8)
    assert found["notes"] == ["the file has no Q/DQ pairs: every convolution and linear layer is counted as INT8",
                              "the file has a fixed batch of 1; its work is scaled to 8"]


def test_published_latencies_lie_in_the_band(models: Path) -> None:
    for precision, measured in (("fp32", 1.578), ("fp16", 0.758), ("int8", 0.485)):
        data = estimate(file=models / "r18.onnx", device="orin-nano-super", precision=precision).data
        assert data["low_ms"] <= measured <= data["high_ms"]


def test_text_says_that_it_is_predicted(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, models / "vit.onnx", "--device", "orin-agx-64", "--power-mode", "30W")
    assert code == 0
    assert "vit.onnx on orin-agx-64 (30W), FP16, batch 1:" in out
    assert "predicted, not measured" in out
    assert "transformer-like" in out
    assert "the clocks of orin-agx-64 in mode 30W are unverified" in out


def test_fp32_is_said_to_be_tf32(models: Path) -> None:
    said = [estimate(file=models / "r18.onnx", device="orin-nano-super", precision=one).data["notes"] for one in PRECISIONS]
    assert [any("TF32" in note for note in notes) for notes in said] == [True, False, False]


def test_a_file_that_computes_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    save_model(graph_of([node], inputs={"x": (1, 3)}, outputs={"y": (1, 3)}), tmp_path / "view.onnx")
    code, out, err = run(capsys, tmp_path / "view.onnx", "--device", "orin-nano-super")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "view.onnx: computes nothing" in err


def test_a_device_file_that_cannot_be_written_is_one_line(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (models / "ok.csv").write_text(measurements(models, 1))
    code, _, err = run(capsys, "--device", "orin-nano-super", "--calibrate", models / "ok.csv", "--out",
                       models / f"{'x' * 300}.toml")
    assert (code, err.count("\n")) == (2, 1)
    assert "file name too long" in err


def test_power_modes_and_batch_order_latencies(models: Path) -> None:
    def ms(**options: Any) -> float:
        return float(estimate(file=models / "r18.onnx", device="orin-agx-64", **options).data["p50_ms"])

    assert ms() < ms(power_mode="50W") < ms(power_mode="30W") < ms(power_mode="15W")
    assert ms() < ms(batch=2) < 2 * ms()


def test_a_bundle_gives_the_file_of_the_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "bundle").root
    for precision, name in (("fp32", "model.fp32.onnx"), ("fp16", "model.fp32.onnx"), ("int8", "model.int8-cpu.onnx")):
        code, out, _ = run(capsys, bundle, "--device", "orin-nano-super", "--precision", precision, "--json")
        found = json.loads(out)
        assert (code, Path(found["file"]).name) == (0, name)
        assert not any("no Q/DQ pairs" in note for note in found["notes"])
    assert "int8" in {layer["precision"] for layer in found["layers"]}


def test_a_changed_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "bundle").root
    with (bundle / "model.fp32.onnx").open("ab") as file:
        file.write(b"x")
    code, _, err = run(capsys, bundle, "--device", "orin-nano-super")
    assert code == 2
    assert err.count("\n") == 1


@pytest.mark.parametrize(("arguments", "said"), [
    (["none.onnx", "--device", "orin-nano-super"], "none.onnx"),
    (["r18.onnx", "--device", "orin-nano-supper"], "did you mean 'orin-nano-super'"),
    (["r18.onnx", "--device", "orin-nano-super", "--power-mode", "99W"], "no power mode '99W'"),
    (["r18.onnx", "--device", "none.toml"], "none.toml"),
    (["r18.onnx", "--device", "this-cpu", "--precision", "fp16"], "no FP16 kernels"),
    (["r18.onnx", "--device", "this-cpu", "--precision", "fp32", "--power-mode", "1"], "no power modes"),
    (["r18.onnx", "--device", "orin-nano-super", "--batch", "0"], "'batch'"),
    (["--device", "orin-nano-super"], "name an ONNX file or a bundle"),
    (["--device", "orin-nano-super", "--calibrate", "x.csv"], "--calibrate needs --out"),
    (["--device", "orin-nano-super", "--calibrate", "x.csv", "--out", "y.toml"], "no such file of measurements"),
    (["--device", "orin-nano-super", "--calibrate", "x.csv", "--out", "y.txt"], "ends in .toml"),
    (["r18.onnx", "--device", "orin-nano-super", "--calibrate", "x.csv", "--out", "y.toml"], "predicts nothing"),
    (["r18.onnx", "--device", "orin-nano-super", "--out", "y.toml"], "--out is where --calibrate writes"),
    (["r18.onnx"], "'device' is required"),
])
def test_faults_are_one_line(models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                             arguments: list[str], said: str) -> None:
    monkeypatch.chdir(models)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def measurements(models: Path, factor: float) -> str:
    """Latencies of a board on which everything takes `factor` times as long as predicted for a planted one."""
    on = device("orin-nano-super")
    constants = on.constants.model_copy(update={"compute": Efficiency(fp32=0.3, fp16=0.4, int8=0.3)})
    on = replace(on, constants=constants)
    lines = ["file,precision,batch,ms"]
    for name in ("r18", "vit", "unet"):
        work = read_work(models / f"{name}.onnx")
        lines += [f"{name}.onnx,{p},{b},{factor * predict(work.rows, on, p, b).p50_ms:.4f}"
                  for p in PRECISIONS for b in (1, 4)]
    return "\n".join(lines) + "\n"


def test_calibration_round_trip(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = models / "measured.csv", tmp_path / "my-board.toml"
    table.write_text(measurements(models, 1.3))
    code, text, _ = run(capsys, "--calibrate", table, "--device", "orin-nano-super", "--out", out, "--json")
    found = json.loads(text)
    assert code == 0
    assert (found["points"], found["models"]) == (18, 3)
    assert len(found["residuals"]) == 18
    _, text, _ = run(capsys, models / "r18.onnx", "--device", out, "--precision", "int8", "--batch", "4", "--json")
    calibrated = json.loads(text)
    before = estimate(file=models / "r18.onnx", device="orin-nano-super", precision="int8", batch=4).data["p50_ms"]
    measured = float(next(line for line in table.read_text().splitlines() if line.startswith("r18.onnx,int8,4")).split(",")[3])
    assert calibrated["device"] == "my-board"
    assert abs(calibrated["p50_ms"] / measured - 1) < 0.1 < abs(before / measured - 1)


@pytest.mark.parametrize(("change", "said"), [
    (lambda text: text.replace("precision", "bits"), "has other columns"),
    (lambda text: "", "has other columns"),
    (lambda text: text.replace("fp16", "fp8", 1), "line 4: unknown precision"),
    (lambda text: text + "r18.onnx,fp16,1\n", "line 20: has a line of another length"),
    (lambda text: text + "r18.onnx,fp16,1,-3\n", "line 20: column ms"),
    (lambda text: text + "r18.onnx,fp16,1,nan\n", "line 20: column ms"),
    (lambda text: text + "r18.onnx,fp16,1.5,3\n", "line 20: column batch"),
    (lambda text: text + "r18.onnx,fp16,one,3\n", "line 20: column batch"),
    (lambda text: text + "gone.onnx,fp16,1,3\n", "gone.onnx"),
    (lambda text: "".join(text.splitlines(keepends=True)[:4]), "too few measurements"),
    (lambda text: text + '"open', "is not CSV"),
])
def test_faults_of_a_table_are_one_line(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                        change: Any, said: str) -> None:
    table, out = models / "faulty.csv", tmp_path / "b.toml"
    table.write_text(change(measurements(models, 1.0)))
    code, _, err = run(capsys, "--calibrate", table, "--device", "orin-nano-super", "--out", out)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_bytes_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00file")
    code, _, err = run(capsys, "--calibrate", tmp_path / "x.csv", "--device", "orin-nano-super", "--out", tmp_path / "y.toml")
    assert code == 2
    assert "is not text" in err

"""This CPU as a device: what is measured at start is plausible and usable. How exact it is: benchmarks/estimate_cpu.py."""

from __future__ import annotations

from pathlib import Path

from fmdeploy.estimate.cpu import KINDS, THIS_CPU, this_cpu_device
from fmdeploy.estimate.estimate import estimate
from fmdeploy.estimate.networks.unet import unet
from fmdeploy.estimate.roofline import seconds
from fmdeploy.estimate.work import Work
from fmdeploy.onnxfile.graph import save_model


def test_this_cpu_is_measured() -> None:
    on = this_cpu_device("int8")
    assert 1e9 < on.peak["fp32"] < 1e12
    assert 1e9 < on.peak["int8"] < 1e13
    assert 1e8 < on.bandwidth < 1e12
    assert set(on.rates) == set(KINDS)
    assert all(1e6 < rate < 1e12 for rate in on.rates.values())
    assert 0 <= on.launch < 1e-3
    assert seconds(Work("n", "norm", reads=10**6, writes=10**6), on, "fp32") > 2e6 / on.rates["norm"]
    assert Work("m", "matmul").precision("int8", on.rest) == "fp32"


def test_the_verb_predicts_for_it(tmp_path: Path) -> None:
    save_model(unet(64, 16, 3, seed=0).model(), tmp_path / "u.onnx")
    data = estimate(file=tmp_path / "u.onnx", device=THIS_CPU, precision="fp32").data
    assert 0 < data["low_ms"] < data["p50_ms"] < data["high_ms"] < 1e4

"""The latency model on a device that is at hand: this CPU, one thread, six networks of different kinds.

    python benchmarks/estimate_cpu.py [--runs N]

The peaks are measured first, as `fmdeploy estimate --device this-cpu` does; then the networks (random weights, FP32)
run in turn, and once more with a second ResNet-18 as the control (A/A). Errors come from the medians, and from the
minima, which a busy machine disturbs less. Target: every network within 25 %. The INT8 row of the student uses the
file that the exporter writes for a CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from int8_cpu import make_files

from fmdeploy.estimate.cpu import CPU_RULES, this_cpu_device
from fmdeploy.estimate.devices import Device
from fmdeploy.estimate.fromonnx import work_of
from fmdeploy.estimate.networks.mobilenet import mobilenet_v2
from fmdeploy.estimate.networks.resnet import resnet
from fmdeploy.estimate.networks.unet import unet
from fmdeploy.estimate.networks.vit import vit
from fmdeploy.estimate.roofline import predict
from fmdeploy.estimate.work import Precision
from fmdeploy.export.formats import file_name
from fmdeploy.onnxfile.reading import read_model
from fmdeploy.onnxfile.session import cpu_session

TARGET = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = networks(Path(folder))
    device = this_cpu_device("int8")
    print(f"FP32 {device.peak['fp32'] / 1e9:.0f} GFLOPS, INT8 {device.peak['int8'] / 1e9:.0f} GOPS, read "
          f"{device.bandwidth / 1e9:.1f} GB/s, {device.launch * 1e6:.2f} us a node, overlap {device.overlap:.2f}")
    print("  " + ", ".join(f"{kind} {rate / 1e9:.2f}" for kind, rate in device.rates.items()) + " 10^9 elements/s")
    times = measure({name: model for name, (model, _) in models.items()}, options.runs)
    for name, (model, precision) in models.items():
        row(name, model, precision, device, times[name])
    again = np.median(times["ResNet-18 again"]) / np.median(times["ResNet-18"])
    print(f"control (A/A): {again:.3f} of medians")


def networks(folder: Path) -> dict[str, tuple[ModelProto, Precision]]:
    """Models by name, and the precision that they run in."""
    make_files(folder)
    return {
        "ResNet-18": (resnet(18, seed=0).model(), "fp32"),
        "ResNet-50": (resnet(50, seed=0).model(), "fp32"),
        "MobileNetV2": (mobilenet_v2(seed=0).model(), "fp32"),
        "ViT-Tiny": (vit("tiny", seed=0).model(), "fp32"),
        "U-Net 128": (unet(seed=0).model(), "fp32"),
        "BEV student": (read_model(folder / file_name("fp32")), "fp32"),
        "BEV student INT8": (read_model(folder / file_name("int8-cpu")), "int8"),
        "ResNet-18 again": (resnet(18, seed=0).model(), "fp32"),
    }


def row(name: str, model: ModelProto, precision: Precision, device: Device, times: np.ndarray[Any, Any]) -> None:
    ms = predict(work_of(model, name, CPU_RULES[precision]).rows, device, precision).p50_ms
    median, least = float(np.median(times)) * 1e3, float(times.min()) * 1e3
    print(f"{'ok ' if abs(ms / median - 1) <= TARGET else 'NOT'} {name:18} predicted {ms:8.3f} ms  "
          f"median {median:8.3f} ({ms / median - 1:+6.1%})  min {least:8.3f} ({ms / least - 1:+6.1%})")


def measure(models: dict[str, ModelProto], runs: int) -> dict[str, np.ndarray[Any, Any]]:
    """Seconds of each run (runs,), the networks taking turns."""
    sessions = {name: cpu_session(model.SerializeToString()) for name, model in models.items()}
    rng = np.random.default_rng(0)
    feeds = {name: {one.name: rng.standard_normal(one.shape).astype(np.float32) for one in session.get_inputs()}
             for name, session in sessions.items()}
    for name, session in sessions.items():
        session.run(None, feeds[name])
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(runs):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, feeds[name])
            found[name].append(time.perf_counter() - started)
    return {name: np.asarray(values) for name, values in found.items()}


if __name__ == "__main__":
    main()

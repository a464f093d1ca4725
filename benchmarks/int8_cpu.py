"""INT8 on the CPU: `model.int8-cpu.onnx` against FP32, and against ONNX Runtime's own U8S8 `quantize_static`.

    python benchmarks/int8_cpu.py [--bundle DIR] [--runs N] [--profile]

One thread, one process, the three files and a second FP32 session (the A/A control) run in turn. Ratios come from the
medians, and from the minima, which a busy machine disturbs less. Without `--bundle` it takes the built-in student with
random weights, which costs the same. `quantize_static` gets the same FP32 file and the same calibration samples.
Targets where the CPU has VNNI: at least 2.5 times as fast as FP32, at most 1.1 times the time of `quantize_static`,
every quantised convolution and residual add fused.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fmdeploy.artifact import open_artifact
from fmdeploy.cpu import this_cpu
from fmdeploy.export.formats import file_name
from fmdeploy.export.fused import fused_ops
from fmdeploy.export.variants import write_variants
from fmdeploy.iospec import IOSpec
from fmdeploy.manifest import Kind
from fmdeploy.onnxfile.session import cpu_session
from fmdeploy.quantize.calibrate import CalibrationSet
from fmdeploy.quantize.ptq import ptq
from fmdeploy.task import Arrays, load_task
from support.ort_static import samples_reader

SPEED_UP, AGAINST_STATIC = 2.5, 1.1
WARM_UP = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--profile", action="store_true", help="print the time of every node of int8-cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = copy_bundle(options.bundle, folder) if options.bundle else make_files(folder)
        quantize_static(folder, inputs)
        feeds = {key: values[:1] for key, values in inputs.items()}
        report(folder, feeds, max(options.runs, 30))
        if options.profile:
            profile(folder / file_name("int8-cpu"), feeds)


def copy_bundle(bundle: Path, folder: Path) -> Arrays:
    """Copy the models of a bundle; returns its golden inputs, to calibrate the other side with."""
    artifact = open_artifact(bundle, Kind.BUNDLE)
    for variant in ("fp32", "int8-cpu"):
        (folder / file_name(variant)).write_bytes(artifact.path(file_name(variant)).read_bytes())
    golden = artifact.tensors("golden.safetensors")
    return {key.removeprefix("input."): value for key, value in golden.items() if key.startswith("input.")}


def make_files(folder: Path) -> Arrays:
    """Export the built-in student with settled random weights; returns calibration samples."""
    from support.quantize_nets import settle

    task = load_task("bev-occupancy")
    inputs = binary_grids(task.io, 16)
    student = settle(task.student("cnn", {}), task.io)
    calibration = CalibrationSet(tuple(f"s/{k:02d}" for k in range(16)), inputs, "", 0)
    write_variants(folder, task.io, student, ptq(student, task.io, calibration).module, inputs=inputs, opset=20,
                   cpu="x86-64")
    return inputs


def binary_grids(io: IOSpec, count: int) -> Arrays:
    rng = np.random.default_rng(0)
    return {s.name: (rng.random((count, *s.shape)) < 0.15).astype(np.float32) for s in io.inputs}


def quantize_static(folder: Path, inputs: Arrays) -> None:
    """Write `static.onnx`: what ONNX Runtime's own tool makes of the FP32 file, in the form it documents as fastest."""
    from onnxruntime.quantization import QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(folder / file_name("fp32")), str(folder / "prepared.onnx"))
    quantize(str(folder / "prepared.onnx"), str(folder / "static.onnx"), samples_reader(inputs),
             quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
             per_channel=True)


def report(folder: Path, feeds: Arrays, runs: int) -> None:
    names = {"fp32": file_name("fp32"), "fp32 again": file_name("fp32"), "int8-cpu": file_name("int8-cpu"),
             "quantize_static": "static.onnx"}
    times = measure({key: cpu_session(folder / name) for key, name in names.items()}, feeds, runs)
    isa = this_cpu()
    print(f"{isa.machine}, VNNI {'yes' if isa.exact_int8 else 'no'}, 1 thread, {runs} interleaved runs")
    for name, row in times.items():
        print(f"  {name:16} median {np.median(row) * 1e3:7.3f} ms   min {row.min() * 1e3:7.3f} ms")
    for title, one, other, target in (
        ("control (A/A)", "fp32 again", "fp32", ""),
        ("fp32 / int8-cpu", "fp32", "int8-cpu", f"   (target >= {SPEED_UP})"),
        ("int8-cpu / quantize_static", "int8-cpu", "quantize_static", f"   (target <= {AGAINST_STATIC})"),
    ):
        ratio = np.median(times[one]) / np.median(times[other])
        print(f"  {title:28} {ratio:6.3f} of medians   {times[one].min() / times[other].min():6.3f} of minima{target}")
    for name in ("int8-cpu", "quantize_static"):
        found = fused_ops(folder / names[name])
        print(f"  {name:16} convs {found.int8_convs} INT8 {found.float_convs} float, adds {found.int8_adds} INT8 "
              f"{found.float_adds} float, {found.quantize_nodes} Q/DQ nodes left")


def measure(sessions: dict[str, Any], feeds: Arrays, runs: int) -> dict[str, np.ndarray[Any, Any]]:
    """Seconds of each run (runs,), the sessions taking turns in an order that turns, too: a run leaves its mark."""
    for session in sessions.values():
        for _ in range(WARM_UP):
            session.run(None, feeds)
    found: dict[str, list[float]] = defaultdict(list)
    names = list(sessions)
    for number in range(runs):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            sessions[name].run(None, feeds)
            found[name].append(time.perf_counter() - started)
    return {name: np.asarray(row) for name, row in found.items()}


def profile(path: Path, feeds: Arrays, runs: int = 50) -> None:
    """Print the median time of every node of the optimised graph."""
    import json

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level, options.enable_profiling = 1, 3, True
    options.profile_file_prefix = str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in range(runs):
        session.run(None, feeds)
    micros: dict[str, list[float]] = defaultdict(list)
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            micros[f"{event['args']['op_name']:20} {event['name'].removesuffix('_kernel_time')}"].append(event["dur"])
    for name, row in sorted(micros.items(), key=lambda item: -float(np.median(item[1]))):
        print(f"  {np.median(row):7.1f} µs  {name}")


if __name__ == "__main__":
    main()

"""INT8 of two known networks on one thread: ours against FP32, plain modelopt and ONNX Runtime's own tool.

    python benchmarks/int8_networks.py [--network resnet18|vit-s] [--runs N]

Random weights (settled BatchNorm), noise images: latency and agreement, no accuracy. One process, in turn:
`fp32` twice (the A/A control), `int8-cpu` (ours), `modelopt` (INT8_DEFAULT_CFG exported and run as it is), `u8s8` and
`u8s8-linear` (`quantize_static` in its fastest documented form, all operators or MatMul, Gemm and Conv only).
Targets with VNNI: ResNet-18 >= 3.2 x FP32, >= 3.3 x the modelopt file, <= 1.1 x the time of U8S8; ViT-S >= 2.2 x FP32.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from int8_cpu import measure
from torch_networks import ResNet18, VitS16, image_io

from fmdeploy.cpu import this_cpu
from fmdeploy.evaluate.sqnr import sqnr_db
from fmdeploy.export.formats import file_name
from fmdeploy.export.fused import fused_ops
from fmdeploy.export.variants import write_variants
from fmdeploy.iospec import IOSpec
from fmdeploy.onnxfile.session import cpu_session
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.calibrate import CalibrationSet
from fmdeploy.quantize.ptq import ptq
from support.ort_static import samples_reader
from support.quantize_nets import samples_of, settle

NETWORKS: dict[str, type[nn.Module]] = {"resnet18": ResNet18, "vit-s": VitS16}
SAMPLES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, action="append")
    parser.add_argument("--runs", type=int, default=60)
    options = parser.parse_args()
    isa = this_cpu()
    print(f"{isa.machine}, exact INT8 {'yes' if isa.exact_int8 else 'no'}, 1 thread, {options.runs} interleaved runs")
    for name in options.network or list(NETWORKS):
        with tempfile.TemporaryDirectory() as folder:
            report(name, Path(folder), max(options.runs, 30))


def report(name: str, folder: Path, runs: int) -> None:
    """Make the five files of one network, time them in turn and print ratios of medians and of minima."""
    io = image_io()
    torch.manual_seed(0)
    net = settle(NETWORKS[name](), io)
    samples = samples_of(io, SAMPLES)
    write_variants(folder, io, net, ptq(net, io, samples).module, inputs=samples.inputs, opset=20, cpu="x86-64")
    plain_modelopt(net, io, samples, folder / "modelopt.onnx")
    static(folder, samples, "u8s8.onnx", None)
    static(folder, samples, "u8s8-linear.onnx", ["MatMul", "Gemm", "Conv"])
    files = {"fp32": file_name("fp32"), "fp32 again": file_name("fp32"), "int8-cpu": file_name("int8-cpu"),
             "modelopt": "modelopt.onnx", "u8s8": "u8s8.onnx", "u8s8-linear": "u8s8-linear.onnx"}
    sessions = {key: cpu_session(folder / file) for key, file in files.items()}
    feeds = {key: values[:1] for key, values in samples.inputs.items()}
    times = measure(sessions, feeds, runs)
    expected = sessions["fp32"].run(None, feeds)[0]
    print(name)
    for key, row in times.items():
        found = fused_ops(folder / files[key])
        print(f"  {key:12} median {np.median(row) * 1e3:7.2f} ms, FP32 / it {ratio(times, 'fp32', key)}, "
              f"SQNR against FP32 {sqnr_db(expected, sessions[key].run(None, feeds)[0]):5.1f} dB; convs "
              f"{found.int8_convs} INT8 {found.float_convs} float, adds {found.int8_adds} {found.float_adds}, matmuls "
              f"{found.int8_matmuls} {found.float_matmuls}")
    print(f"  modelopt / int8-cpu {ratio(times, 'modelopt', 'int8-cpu')}; "
          f"int8-cpu / u8s8 {ratio(times, 'int8-cpu', 'u8s8')}")


def ratio(times: dict[str, np.ndarray[Any, Any]], one: str, other: str) -> str:
    medians, minima = np.median(times[one]) / np.median(times[other]), times[one].min() / times[other].min()
    return f"{medians:.3f} (minima {minima:.3f})"


def plain_modelopt(net: nn.Module, io: IOSpec, samples: CalibrationSet, path: Path) -> None:
    """What modelopt's own recipe gives: its default configuration, exported without anything of ours."""
    names = [spec.name for spec in io.inputs]
    mtq = modelopt.load()

    def loop(model: nn.Module) -> None:
        for k in range(len(samples)):
            model(*samples.tensors(names, slice(k, k + 1)))

    with torch.no_grad():
        quantised = mtq.quantize(copy.deepcopy(net), mtq.INT8_DEFAULT_CFG, loop)
    modelopt.onnx_export(quantised.eval(), samples.tensors(names, slice(0, 1)), str(path), opset_version=17,
                         input_names=names, output_names=[spec.name for spec in io.outputs])


def static(folder: Path, samples: CalibrationSet, name: str, ops: list[str] | None) -> None:
    """Write what `quantize_static` makes of the FP32 file, U8S8 with weights per channel."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(folder / file_name("fp32")), str(folder / "prepared.onnx"))
    quantize_static(str(folder / "prepared.onnx"), str(folder / name), samples_reader(samples.inputs),
                    quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                    per_channel=True, op_types_to_quantize=ops)


if __name__ == "__main__":
    main()

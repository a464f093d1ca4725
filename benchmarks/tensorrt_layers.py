"""What TensorRT-RTX compiles of a student's INT8 file, with residual adds quantised on one side and on both.

    python benchmarks/tensorrt_layers.py [--student STUDENT --data DATA]

It prints engine layers, kernels by kind, and the bytes that layers read and write (weights left out), for pairs on both
operands of every add, without the pair between a convolution and its add (as exported), and without the pair on the
skipped tensor. No GPU is needed and nothing is timed: layers and operand types are all that ahead-of-time compilation
fixes. Without `--student` it takes the built-in student with random weights.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from onnx import ModelProto
from torch import nn

from fmdeploy.artifact import open_artifact
from fmdeploy.data.format import open_dataset
from fmdeploy.export.branches import drop_branch_pairs
from fmdeploy.export.fp16 import half_precision
from fmdeploy.export.onnx import export_onnx
from fmdeploy.export.tensorrt.compilecheck import CompileReport, compile_check
from fmdeploy.iospec import IOSpec
from fmdeploy.manifest import Kind
from fmdeploy.models.saved import load_model
from fmdeploy.onnxfile.graph import DQ, Graph, save_model
from fmdeploy.quantize.calibrate import CalibrationSet, draw
from fmdeploy.quantize.ptq import ptq
from support.quantize_nets import bev_student, samples_of

BYTES = {"FP32": 4, "FP16": 2, "INT8": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    net, io, samples = _trained(options.student, options.data) if options.student else _random()
    forms: dict[str, Callable[[ModelProto], object]] = {
        "pairs on both operands": lambda model: None,
        "none behind the convolution (as exported)": drop_branch_pairs,
        "none on the skipped tensor": drop_skip_pairs,
    }
    with tempfile.TemporaryDirectory() as name:
        graph = export_onnx(ptq(net, io, samples).module, io, Path(name) / "qdq.onnx")
        for title, change in forms.items():
            model = ModelProto()
            model.CopyFrom(graph)
            change(model)
            save_model(half_precision(model), Path(name) / "m.onnx")
            print(f"{title:44} {describe(compile_check(Path(name) / 'm.onnx'))}")


def _random() -> tuple[nn.Module, IOSpec, CalibrationSet]:
    net, io = bev_student()
    return net, io, samples_of(io)


def _trained(student: Path, data: Path) -> tuple[nn.Module, IOSpec, CalibrationSet]:
    loaded = load_model(open_artifact(student, Kind.STUDENT))
    return loaded.module, loaded.task.io, draw(loaded.task, open_dataset(data), count=64, seed=0)


def drop_skip_pairs(model: ModelProto) -> None:
    """Remove the pair of the operand of each add that is not a convolution's result."""
    graph = Graph(model)
    for add in graph.nodes("Add"):
        for slot, name in enumerate(add.input):
            dequantize = graph.maker.get(name)
            if dequantize is not None and dequantize.op_type == DQ:
                source = graph.maker[dequantize.input[0]].input[0]
                if graph.maker[source].op_type != "Conv":
                    add.input[slot] = source


def describe(report: CompileReport) -> str:
    """One line: layers, kernels, bytes of activations, types of the products."""
    moved = sum(math.prod(t.dims) * BYTES.get(t.dtype, 4) for layer in report.layers
                for t in (*layer.inputs, *layer.outputs))
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(Counter(x.kind for x in report.layers).items()))
    return f"{len(report.layers)} layers ({kinds}); {moved / 1e6:.2f} MB read and written; {report.counts}"


if __name__ == "__main__":
    main()

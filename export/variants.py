"""The model files of a bundle, and how each one is run to say what it means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
from torch import nn

from fmdeploy.cpu import this_cpu
from fmdeploy.errors import ModelFileError
from fmdeploy.export.dialects import cpu_dialect
from fmdeploy.export.fused import fused_ops
from fmdeploy.export.isa import saturating_layers
from fmdeploy.export.onnx import export_onnx
from fmdeploy.iospec import IOSpec
from fmdeploy.onnxfile.graph import DQ, Q, op_counts, save_model
from fmdeploy.onnxfile.session import ort_predictor
from fmdeploy.quantize.build import tracing_example
from fmdeploy.quantize.trace import UntraceableError, float_graph
from fmdeploy.task import Arrays

CpuKind = Literal["x86-64", "arm64"]


def file_name(variant: str) -> str:
    """Name of a variant's file in the bundle."""
    return f"model.{variant}.onnx"


@dataclass(frozen=True)
class Variants:
    """The files that were written, in a folder."""

    folder: Path
    io: IOSpec
    names: tuple[str, ...]
    saturating: tuple[str, ...] = ()

    def path(self, variant: str) -> Path:
        """Where the file of `variant` is."""
        return self.folder / file_name(variant)

    def predictor(self, variant: str) -> Callable[[Arrays], Arrays]:
        """Run a file: `int8` as it is written, since no CPU runtime is its target; the others as they will run."""
        return ort_predictor(self.path(variant), self.io, optimise=variant != "int8")

    def describe(self) -> dict[str, Any]:
        """Numbers about every file: size, format and operators, and what ONNX Runtime fuses here."""
        return {variant: self._describe(variant) for variant in self.names}

    def _describe(self, variant: str) -> dict[str, Any]:
        path = self.path(variant)
        model = onnx.load(str(path))
        counts = op_counts(model)
        found: dict[str, Any] = {
            "bytes": path.stat().st_size, "ir_version": model.ir_version, "opset": model.opset_import[0].version,
            "nodes": sum(counts.values()), "quantize_pairs": min(counts[Q], counts[DQ]),
        }
        if variant == "int8-cpu":
            fused = fused_ops(path)
            found["fused"] = {"int8_convs": fused.int8_convs, "float_convs": fused.float_convs,
                              "int8_adds": fused.int8_adds, "float_adds": fused.float_adds}
        return found


def write_variants(
    folder: Path, io: IOSpec, student: nn.Module, quantised: nn.Module | None, *, opset: int, cpu: CpuKind
) -> Variants:
    """Write `model.fp32.onnx`, and with a quantised module `model.int8.onnx` and `model.int8-cpu.onnx`.

    Args:
        folder: Where to.
        io: Names and shapes.
        student: The float module.
        quantised: The calibrated fake-quantised one.
        opset: ONNX operator set.
        cpu: Whose INT8 kernels `int8-cpu` is spelled for.

    Raises:
        ModelFileError: a module cannot be exported, or this machine cannot run `int8-cpu` faithfully.
    """
    export_onnx(float_module(student, io), io, folder / file_name("fp32"), opset=opset)
    if quantised is None:
        return Variants(folder, io, ("fp32",))
    int8 = export_onnx(quantised, io, folder / file_name("int8"), opset=opset)
    # Inputs that the runtime's guards keep at or above 0 stay below 128 levels: no saturation without VNNI.
    positive = [spec.name for spec in io.inputs if spec.value_range is not None and spec.value_range[0] >= 0]
    spelled = cpu_dialect(int8, signed=cpu == "arm64", non_negative=positive)
    saturating = saturating_layers(spelled)
    require_exact(saturating)
    save_model(spelled, folder / file_name("int8-cpu"))
    return Variants(folder, io, ("fp32", "int8", "int8-cpu"), saturating)


def float_module(student: nn.Module, io: IOSpec) -> nn.Module:
    """The student with BatchNorm folded, where torch.fx can follow it; else the student itself."""
    try:
        return float_graph(student, tracing_example(io))
    except UntraceableError:
        return student.eval()


def require_exact(saturating: tuple[str, ...]) -> None:
    """Refuse to measure on a CPU that would saturate: its numbers would speak for no other machine.

    Raises:
        ModelFileError: names the first layer.
    """
    if saturating and not this_cpu().exact_int8:
        raise ModelFileError("this CPU has no VNNI: 8-bit products saturate", where=saturating[0],
                             fix="Export on a CPU with VNNI, or put a ReLU before that layer")

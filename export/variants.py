"""The model files of a bundle, and how each one is run to say what it means.

    fp32       from the float student
    fp16       the same graph typed FP16, FP32 where the overflow probe says so: for TensorRT
    int8       Q/DQ pairs, the rest FP16 (or FP32), adds as TensorRT fuses them (`branches.py`): for TensorRT
    int8-cpu   the same grid, spelled for ONNX Runtime on the CPU

Both INT8 files come from one FP32-typed Q/DQ graph, which stays in the draft's scratch folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto
from torch import nn

from fmdeploy.arrays import Arrays
from fmdeploy.draft import WORK_NAME
from fmdeploy.export.branches import drop_branch_pairs
from fmdeploy.export.dialects import CpuSpelling, spell_for_cpu
from fmdeploy.export.formats import Rest, file_name
from fmdeploy.export.fp16 import half_precision, rounding_made_explicit
from fmdeploy.export.fp16probe import Kept, probe
from fmdeploy.export.fused import fused_ops
from fmdeploy.export.isa import CpuKind, require_exact
from fmdeploy.export.onnx import export_onnx
from fmdeploy.iospec import IOSpec
from fmdeploy.onnxfile.graph import DQ, Q, op_counts, save_model
from fmdeploy.onnxfile.session import ort_predictor
from fmdeploy.quantize.build import tracing_example
from fmdeploy.quantize.trace import UntraceableError, float_graph

TYPED = ("fp16", "int8")  # what these files mean is in their types; no CPU runtime is their target
QDQ = "qdq"  # the FP32-typed graph that both INT8 files come from


@dataclass(frozen=True)
class Variants:
    """The files that were written, in a folder.

    Attributes:
        folder: Where they are.
        io: Names and shapes.
        names: Variants in the bundle.
        saturating: Layers of `int8-cpu` that may saturate on x86 without VNNI.
        kept: Variant → nodes that stay FP32 there, and why.
        narrowed: Layers of `int8-cpu` whose weights have 7 bits.
    """

    folder: Path
    io: IOSpec
    names: tuple[str, ...]
    saturating: tuple[str, ...] = ()
    kept: dict[str, tuple[Kept, ...]] = field(default_factory=dict)
    narrowed: tuple[str, ...] = ()

    def path(self, variant: str) -> Path:
        """Where the file of `variant` is; `qdq` is in the scratch folder."""
        return self.folder / WORK_NAME / file_name(QDQ) if variant == QDQ else self.folder / file_name(variant)

    def predictor(self, variant: str) -> Callable[[Arrays], Arrays]:
        """Run a file: `fp16` and `int8` as their types say, operator by operator; the others as they will run."""
        if variant in TYPED:
            model = rounding_made_explicit(onnx.load(str(self.path(variant))))
            return ort_predictor(model.SerializeToString(), self.io, optimise=False)
        return ort_predictor(self.path(variant), self.io, optimise=variant != QDQ)

    def describe(self) -> dict[str, Any]:
        """Numbers about every file: size, format and operators, what stays FP32, what ONNX Runtime fuses here."""
        return {variant: self._describe(variant) for variant in self.names}

    def _describe(self, variant: str) -> dict[str, Any]:
        path = self.path(variant)
        model = onnx.load(str(path))
        counts = op_counts(model)
        found: dict[str, Any] = {
            "bytes": path.stat().st_size, "ir_version": model.ir_version, "opset": model.opset_import[0].version,
            "nodes": sum(counts.values()), "quantize_pairs": min(counts[Q], counts[DQ]),
        }
        if variant in self.kept:
            found["fp32_nodes"] = [row.to_json() for row in self.kept[variant]]
        if variant == "int8-cpu":
            found["weights_of_7_bits"] = list(self.narrowed)
            fused = fused_ops(path)
            found["fused"] = {"int8_convs": fused.int8_convs, "float_convs": fused.float_convs,
                              "int8_adds": fused.int8_adds, "float_adds": fused.float_adds}
        return found


def write_variants(
    folder: Path, io: IOSpec, student: nn.Module, quantised: nn.Module | None, *, inputs: Arrays, opset: int,
    cpu: CpuKind, rest: Rest = "fp16",
) -> Variants:
    """Write `model.fp32.onnx` and `model.fp16.onnx`, and with a quantised module the two INT8 files.

    Args:
        folder: Where to.
        io: Names and shapes.
        student: The float module.
        quantised: The calibrated fake-quantised one.
        inputs: Calibration inputs (N, ...) that the overflow probe runs.
        opset: ONNX operator set.
        cpu: Whose INT8 kernels `int8-cpu` is spelled for.
        rest: Type of what is not INT8 in `model.int8.onnx`.

    Raises:
        ModelFileError: a module cannot be exported, or this machine cannot run `int8-cpu` faithfully.
    """
    plain = export_onnx(float_module(student, io), io, folder / file_name("fp32"), opset=opset)
    kept = {"fp16": _write_half(plain, inputs, folder / file_name("fp16"))}
    if quantised is None:
        return Variants(folder, io, ("fp32", "fp16"), kept=kept)
    scratch = folder / WORK_NAME / file_name(QDQ)
    scratch.parent.mkdir(parents=True, exist_ok=True)
    graph = export_onnx(quantised, io, scratch, opset=opset)
    int8 = ModelProto()
    int8.CopyFrom(graph)
    drop_branch_pairs(int8)
    if rest == "fp16":
        kept["int8"] = _write_half(int8, inputs, folder / file_name("int8"))
    else:
        save_model(int8, folder / file_name("int8"))
    spelled = _write_cpu(graph, io, folder, cpu)
    return Variants(folder, io, ("fp32", "fp16", "int8", "int8-cpu"), spelled.saturating, kept, spelled.narrowed)


def _write_half(model: ModelProto, inputs: Arrays, path: Path) -> tuple[Kept, ...]:
    kept = probe(model, inputs)
    save_model(half_precision(model, keep={row.node for row in kept}), path)
    return kept


def _write_cpu(graph: ModelProto, io: IOSpec, folder: Path, cpu: CpuKind) -> CpuSpelling:
    # Inputs that the runtime's guards keep at or above 0 stay below 128 levels: no saturation without VNNI.
    positive = [spec.name for spec in io.inputs if spec.value_range is not None and spec.value_range[0] >= 0]
    spelled = spell_for_cpu(graph, cpu, non_negative=positive)
    require_exact(spelled.saturating)
    save_model(spelled.model, folder / file_name("int8-cpu"))
    return spelled


def float_module(student: nn.Module, io: IOSpec) -> nn.Module:
    """The student with BatchNorm folded, where torch.fx can follow it; else the student itself."""
    try:
        return float_graph(student, tracing_example(io))
    except UntraceableError:
        return student.eval()

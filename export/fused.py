"""Which operations ONNX Runtime really runs in INT8: counted in the graph that it optimised, not assumed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx

from fmdeploy.onnxfile.graph import op_counts
from fmdeploy.optional import require

INTEGER_CONVS = ("QLinearConv", "com.microsoft.QLinearConv")
FLOAT_CONVS = ("Conv", "com.microsoft.FusedConv", "com.microsoft.nchwc.Conv")


@dataclass(frozen=True)
class FusedOps:
    """Node counts of an optimised graph."""

    int8_convs: int
    float_convs: int
    int8_adds: int
    float_adds: int
    int8_matmuls: int
    float_matmuls: int
    quantize_nodes: int
    counts: dict[str, int]


def fused_ops(path: Path) -> FusedOps:
    """Let ONNX Runtime optimise the model at `path` for this CPU and count what came out."""
    ort = require("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns that an optimised model belongs to one machine: we throw it away
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        counts = op_counts(onnx.load(options.optimized_model_filepath))

    def total(*names: str) -> int:
        return sum(counts[name] for name in names)

    return FusedOps(
        int8_convs=total(*INTEGER_CONVS),
        float_convs=total(*FLOAT_CONVS),
        int8_adds=total("com.microsoft.QLinearAdd"),
        float_adds=total("Add"),
        int8_matmuls=total("QLinearMatMul", "com.microsoft.QGemm", "com.microsoft.MatMulIntegerToFloat"),
        float_matmuls=total("MatMul", "Gemm", "com.microsoft.FusedMatMul", "com.microsoft.FusedGemm"),
        quantize_nodes=total("QuantizeLinear", "DequantizeLinear"),
        counts=dict(sorted(counts.items())),
    )

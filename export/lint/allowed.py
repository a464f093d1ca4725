"""Which operators may stand in a bundle: those that TensorRT, ONNX Runtime and our tests know."""

from __future__ import annotations

from onnx import ModelProto

from fmdeploy.errors import ModelFileError

_ALLOWED = """
    Conv ConvTranspose Gemm MatMul Add Sub Mul Div Sqrt Pow Exp Log Neg Abs Erf Reciprocal
    Relu LeakyRelu PRelu Clip Sigmoid Tanh Elu Gelu HardSigmoid HardSwish Softplus Softmax
    LayerNormalization InstanceNormalization GroupNormalization BatchNormalization
    MaxPool AveragePool GlobalAveragePool GlobalMaxPool ReduceMean ReduceMax ReduceSum ReduceL2
    Resize DepthToSpace SpaceToDepth Concat Split Slice Pad Reshape Flatten Transpose Squeeze Unsqueeze
    Gather Expand Tile Cast Identity Constant Where Equal Greater Less ArgMax
    QuantizeLinear DequantizeLinear
"""
ALLOWED = frozenset(_ALLOWED.split())
DOMAINS = ("", "ai.onnx")


def require_allowed(model: ModelProto, *, where: object) -> None:
    """Check every node against the allowlist.

    Raises:
        ModelFileError: names the operator and the node.
    """
    for node in model.graph.node:
        if node.domain not in DOMAINS:
            raise ModelFileError(f"holds an operator of a foreign domain: {node.domain}.{node.op_type}", where=where,
                                 fix="Build the student from plain torch operators")
        if node.op_type not in ALLOWED:
            raise ModelFileError(f"holds the operator {node.op_type} ({node.name}), which is not on the allowlist",
                                 where=where,
                                 fix="Replace it in the student, or extend export/lint/allowed.py with a test")

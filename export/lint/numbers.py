"""Rules on the numbers of Q/DQ pairs: zero points, types, and along what the scales run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from fmdeploy.export.lint.finding import Rule, Subject, Where
from fmdeploy.onnxfile.graph import DQ, Q, attribute

TRT_CHECK = "measured with the TensorRT-RTX 1.7.1 parser"
QLINEAR = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
INTEGERS: dict[int, str] = {TensorProto.INT8: "int8", TensorProto.UINT8: "uint8", TensorProto.INT16: "int16",
            TensorProto.UINT16: "uint16", TensorProto.INT4: "int4", TensorProto.UINT4: "uint4",
            TensorProto.FLOAT8E4M3FN: "float8", TensorProto.FLOAT8E5M2: "float8"}


def levels_kind(subject: Subject, node: NodeProto) -> int:
    """Element type of the levels that a Q makes or a DQ reads; ONNX: a Q without zero point makes uint8."""
    if len(node.input) > 2 and node.input[2]:
        return subject.kind(node.input[2])
    if node.op_type == Q:
        return int(attribute(node, "output_dtype", 0)) or TensorProto.UINT8
    return subject.kind(node.input[0])


def has_zero_point(subject: Subject, node: NodeProto) -> bool:
    """Whether a Q or DQ has a constant zero point that is not 0."""
    zero = subject.constants.get(node.input[2]) if len(node.input) > 2 else None
    return zero is not None and bool(np.any(zero.astype(np.float32) != 0))


def _nonzero(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes(Q, DQ):
        if has_zero_point(subject, node) and not (node.op_type == DQ and subject.made_by(node.input[0], Q)):
            yield subject.called(node), f"found {subject.constants[node.input[2]].ravel()[0]}"


def _unsigned(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes(Q):
        if levels_kind(subject, node) == TensorProto.UINT8 and not has_zero_point(subject, node):
            scale = subject.constants.get(node.input[1])
            step = 0.0 if scale is None else float(scale.max())
            yield subject.called(node), f"clips at {127 * step:.4g} instead of {255 * step:.4g}" if step else ""


def _unsigned_constant(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes(DQ):
        if node.input[0] in subject.constants and subject.kind(node.input[0]) == TensorProto.UINT8:
            yield subject.called(node), ""


def _int32(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes(DQ):
        if subject.kind(node.input[0]) == TensorProto.INT32:
            yield subject.called(node), ""


def _computed_scale(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes(Q, DQ):
        if any(name and name not in subject.constants for name in node.input[1:]):
            yield subject.called(node), ""


def _other_width(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes(Q, DQ):
        kind = levels_kind(subject, node)
        if kind in (TensorProto.INT16, TensorProto.UINT16):
            yield subject.called(node), f"found {INTEGERS[kind]}"


def _other_hardware(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes(Q, DQ):
        kind = levels_kind(subject, node)
        if INTEGERS.get(kind) in ("float8", "int4", "uint4"):
            yield subject.called(node), f"found {INTEGERS[kind]}"


def _channel_activation(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes(Q):
        scale = subject.constants.get(node.input[1])
        if scale is not None and scale.size > 1 and node.input[0] not in subject.constants:
            yield subject.called(node), f"{scale.size} scales"


def _weight_axis(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes("Conv", "ConvTranspose", "Gemm"):
        dequantize = subject.made_by(node.input[1], DQ)
        scale = subject.constants.get(dequantize.input[1]) if dequantize is not None else None
        if dequantize is None or scale is None or scale.size == 1:
            continue
        wanted = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if attribute(node, "transB", 0) else 1}[node.op_type]
        rank = len(subject.shape(node.input[1]) or (0,) * 4)
        axis = int(attribute(dequantize, "axis", 1)) % max(rank, 1)
        if axis != wanted:
            yield subject.called(node), f"axis {axis}, the outputs lie along {wanted}"


def _operator_form(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes(*QLINEAR):
        yield subject.called(node), node.op_type


RULES = (
    Rule("FMD001", "zero point that is not 0", {"tensorrt": "refused", "dla": "refused"},
         "TensorRT multiplies signed 8-bit numbers with zero point 0 only: its parser stops here",
         "Quantise symmetrically (ONNX Runtime: ActivationSymmetric=True), or lower the file with export --from-onnx",
         _nonzero, TRT_CHECK),
    Rule("FMD002", "uint8 with zero point 0", {"tensorrt": "wrong", "dla": "wrong"},
         "TensorRT has no uint8: it takes this as int8, warns in its log only, and clips the upper half of the range",
         "Quantise to int8, or lower the file with export --from-onnx", _unsigned,
         TRT_CHECK + "; github.com/NVIDIA/TensorRT/issues/2081"),
    Rule("FMD003", "uint8 weights", {"tensorrt": "refused", "dla": "refused"},
         "TensorRT's DequantizeLinear reads no uint8 constants",
         "Quantise weights to int8 (ONNX Runtime: weight_type=QInt8), or lower the file with export --from-onnx",
         _unsigned_constant, TRT_CHECK),
    Rule("FMD004", "INT32 bias behind a DequantizeLinear", {"tensorrt": "refused", "dla": "refused"},
         "TensorRT's DequantizeLinear reads no INT32: its parser stops here",
         "Keep biases float (ONNX Runtime: QuantizeBias=False), or lower the file with export --from-onnx", _int32,
         TRT_CHECK),
    Rule("FMD005", "scale computed at run time", {"tensorrt": "refused", "dla": "refused", "ort": "slow"},
         "TensorRT needs scales as constants: its compiler crashes on computed ones, and ONNX Runtime fuses nothing",
         "Quantise statically, with calibration data", _computed_scale, TRT_CHECK),
    Rule("FMD006", "16-bit levels", {"tensorrt": "refused", "dla": "refused", "ort": "slow"},
         "no INT8 unit multiplies 16-bit numbers, and TensorRT does not import the type", "Quantise to 8 bits",
         _other_width, TRT_CHECK),
    Rule("FMD007", "float8 or 4-bit levels", {"tensorrt": "risky", "dla": "refused", "ort": "slow"},
         "an Orin (SM 8.7) multiplies FP16 and INT8: it has no FP8, and 4-bit weights save memory only",
         "Quantise to int8", _other_hardware, "TensorRT-Edge-LLM support matrix"),
    Rule("FMD008", "one scale a channel on an activation", {"tensorrt": "slow", "dla": "slow", "ort": "slow"},
         "a sum over channels with scales of their own cannot run in integers: the layer runs in float",
         "Use one scale a tensor for activations", _channel_activation, TRT_CHECK + ": the convolution is FP32"),
    Rule("FMD009", "weight scales along another axis", {"tensorrt": "slow", "dla": "slow", "ort": "slow"},
         "the scales of weights must run along the output channels: the layer runs in float",
         "Quantise weights along their output channels", _weight_axis, TRT_CHECK + ": the convolution is FP32"),
    Rule("FMD010", "operator form of quantisation", {"tensorrt": "refused", "dla": "refused"},
         "TensorRT reads explicit Q/DQ pairs and knows no integer operators",
         "Write Q/DQ form (ONNX Runtime: quant_format=QuantFormat.QDQ)", _operator_form, TRT_CHECK),
)

"""Rules on operators: those that TensorRT's parser refuses, those that it builds wrongly, and decomposed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from fmdeploy.export.lint.finding import Rule, Subject, Where
from fmdeploy.export.lint.numbers import QLINEAR, TRT_CHECK
from fmdeploy.onnxfile.graph import DQ, attribute

# ONNX's operators up to opset 26 for which OnnxParser.supports_operator of TensorRT-RTX 1.7.1.116 says no.
_UNKNOWN = """
    AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress
    ConcatFromSequence ConvInteger CumProd DFT DeformConv Det DynamicQuantizeLinear ImageDecoder MatMulInteger
    MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement
    OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty
    SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat
    StringNormalizer StringSplit SwiGLU TfIdfVectorizer Unique
"""
UNKNOWN_TO_TENSORRT = frozenset(_UNKNOWN.split())
RESIZES = (b"asymmetric", b"align_corners", b"half_pixel", b"pytorch_half_pixel", b"tf_half_pixel_for_nn")
GRID_SAMPLE_OPSET = 20  # renames the modes; engines built from it answer differently


def _dilated_pool(node: NodeProto) -> bool:
    return any(size != 1 for size in attribute(node, "dilations", ()))


# What the parser refuses in operators that it knows, each seen to be refused by TensorRT-RTX 1.7.1.116.
REFUSED_FORMS: dict[str, Callable[[NodeProto], str]] = {
    "Resize": lambda node: (
        "antialias" if attribute(node, "antialias", 0) else
        "keep_aspect_ratio_policy" if attribute(node, "keep_aspect_ratio_policy", b"stretch") != b"stretch" else
        "coordinate_transformation_mode"
        if attribute(node, "coordinate_transformation_mode", b"half_pixel") not in RESIZES else ""),
    "AveragePool": lambda node: "dilations" if _dilated_pool(node) else "",
    "MaxPool": lambda node: (
        "dilations" if _dilated_pool(node) else "indices as output" if any(node.output[1:]) else ""),
    "ScatterElements": lambda node: "reduction" if attribute(node, "reduction", b"none") != b"none" else "",
    "ScatterND": lambda node: "reduction" if attribute(node, "reduction", b"none") != b"none" else "",
    "NonZero": lambda node: "a size that depends on data",
}


def _unknown(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes(*(UNKNOWN_TO_TENSORRT - set(QLINEAR))):
        yield subject.called(node), node.op_type


def _refused_form(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes(*REFUSED_FORMS):
        if what := REFUSED_FORMS[node.op_type](node):
            yield subject.called(node), f"{node.op_type}: {what}"


def _grid_sample_20(subject: Subject) -> Iterator[tuple[Where, str]]:
    if subject.opset >= GRID_SAMPLE_OPSET:
        for node in subject.nodes("GridSample"):
            yield subject.called(node), f"opset {subject.opset}"


def _grid_sample(subject: Subject) -> Iterator[tuple[Where, str]]:
    if subject.opset < GRID_SAMPLE_OPSET:
        for node in subject.nodes("GridSample"):
            yield subject.called(node), ""


def _batchnorm(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes("BatchNormalization"):
        maker = subject.made_by(node.input[0])
        behind = maker is not None and maker.op_type in ("Conv", "ConvTranspose", "Gemm")
        yield subject.called(node), f"behind {subject.called(maker)}" if behind and maker is not None else ""


def layer_norm_chains(subject: Subject) -> Iterator[NodeProto]:
    """First nodes of ReduceMean, Sub, (Pow or Mul), ReduceMean, Add, Sqrt, Div: a LayerNormalization in parts."""
    for mean in subject.nodes("ReduceMean"):
        for centred in (node for node in subject.readers[mean.output[0]] if node.op_type == "Sub"):
            squares = [node for node in subject.readers[centred.output[0]] if node.op_type in ("Pow", "Mul")]
            means = [node for square in squares for node in subject.readers[square.output[0]]
                     if node.op_type == "ReduceMean"]
            if means:
                yield mean
                break


def _layer_norm_half(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in layer_norm_chains(subject):
        if subject.kind(node.input[0]) == TensorProto.FLOAT16:
            yield subject.called(node), ""


def _layer_norm(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in layer_norm_chains(subject):
        if subject.kind(node.input[0]) != TensorProto.FLOAT16:
            yield subject.called(node), ""


def _gelu(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes("Erf"):
        yield subject.called(node), ""


def _softmax(subject: Subject) -> Iterator[tuple[Where, str]]:
    """Exp whose sum divides it, without the maximum taken off first."""
    for node in subject.nodes("Exp"):
        sums = [r for r in subject.readers[node.output[0]] if r.op_type == "ReduceSum"]
        divided = any(r.op_type == "Div" for total in sums for r in subject.readers[total.output[0]])
        shifted = subject.made_by(node.input[0], "Sub")
        safe = shifted is not None and subject.made_by(shifted.input[1], "ReduceMax") is not None
        if divided and not safe and subject.kind(node.input[0]) == TensorProto.FLOAT16:
            yield subject.called(node), ""


def _half_constants(subject: Subject) -> Iterator[tuple[Where, str]]:
    for name, value in subject.constants.items():
        if subject.kind(name) == TensorProto.FLOAT16 and not np.isfinite(value.astype(np.float32)).all():
            yield name, "infinity or NaN"


def _computed_weights(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes("Conv", "ConvTranspose"):
        name = node.input[1]
        maker = subject.made_by(name)
        while maker is not None and maker.op_type in (DQ, "QuantizeLinear", "Cast", "Transpose", "Reshape", "Identity"):
            name = maker.input[0]
            maker = subject.made_by(name)
        if name not in subject.constants:
            yield subject.called(node), ""


RULES = (
    Rule("FMD201", "operator that TensorRT does not know", {"tensorrt": "refused", "dla": "refused"},
         "TensorRT's parser has no importer for it, and a plugin would be code of your own on the device",
         "Build the network from other operators", _unknown, "OnnxParser.supports_operator, TensorRT-RTX 1.7.1"),
    Rule("FMD202", "form of an operator that TensorRT does not import", {"tensorrt": "refused", "dla": "refused"},
         "TensorRT's parser knows the operator, not this attribute",
         "Export it without; for Resize use half_pixel or align_corners", _refused_form,
         TRT_CHECK + "; github.com/NVIDIA/TensorRT/issues/3560, 3750"),
    Rule("FMD203", "GridSample of opset 20", {"tensorrt": "wrong", "dla": "wrong"},
         "TensorRT builds GridSample of opset 20 and answers with other numbers than the same node of opset 18",
         "Export with opset 16 to 18, and prove the engine on the golden vectors", _grid_sample_20,
         "github.com/NVIDIA/TensorRT/issues/4646 (open)"),
    Rule("FMD204", "GridSample below opset 20", {"tensorrt": "risky", "dla": "slow"},
         "strongly typed engines with GridSample in FP32 among FP16 layers were seen to answer wrongly, 5-D inputs are "
         "refused by TensorRT 10.6",
         "Prove the engine on the golden vectors", _grid_sample,
         "github.com/NVIDIA/TensorRT/issues/4813, 4618; github.com/pytorch/TensorRT/issues/4074"),
    Rule("FMD205", "BatchNormalization that was not folded", {"tensorrt": "slow", "dla": "note", "ort": "slow"},
         "behind an INT8 layer it keeps the layer from writing INT8, and its scale is not in the calibrated range",
         "Fold it before quantising: fmdeploy quantize and export --from-onnx do", _batchnorm,
         "modelopt leaves it behind a quantised convolution"),
    Rule("FMD206", "LayerNormalization in parts, in FP16", {"tensorrt": "risky", "ort": "risky"},
         "the square overflows beyond |x| = 255 in FP16: a ViT-B falls from 85.3 % to 19.0 % top-1",
         "Export with opset 17 or later, which keeps LayerNormalization one operator", _layer_norm_half,
         "github.com/NVIDIA/TensorRT/issues/2564, 2781; github.com/onnxsim/onnxsim/pull/1742"),
    Rule("FMD207", "LayerNormalization in parts", {"tensorrt": "note", "ort": "note"},
         "nine nodes where one would do; once typed FP16 its square overflows beyond |x| = 255",
         "Export with opset 17 or later", _layer_norm, "github.com/NVIDIA/TensorRT/issues/2781"),
    Rule("FMD208", "Gelu in parts", {"tensorrt": "note", "ort": "note"},
         "five nodes where one would do; whether they fuse depends on the version", "Export with opset 20", _gelu,
         "onnx.ai: Gelu since opset 20"),
    Rule("FMD209", "softmax in parts without its maximum, in FP16", {"tensorrt": "risky", "ort": "risky"},
         "exp(x) overflows beyond x = 11 in FP16", "Use the Softmax operator, which subtracts the maximum", _softmax,
         "IEEE 754: the largest FP16 number is 65504"),
    Rule("FMD210", "FP16 constant that is infinite", {"tensorrt": "risky", "ort": "risky"},
         "a constant such as a mask of -1e9 became infinity in FP16: infinity minus infinity is NaN",
         "Use a mask that FP16 can hold, such as -1e4", _half_constants, "github.com/NVIDIA/TensorRT/issues/2466"),
    Rule("FMD211", "weights that are no constants", {"tensorrt": "slow", "dla": "refused", "ort": "slow"},
         "a convolution with computed weights has no fast kernel, and none in INT8", "Store them as initialisers",
         _computed_weights, TRT_CHECK + ": FP32"),
)

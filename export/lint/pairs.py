"""Rules on where Q/DQ pairs stand: what they make run in INT8, and what they keep from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from onnx import NodeProto

from fmdeploy.export.lint.finding import Rule, Subject, Where
from fmdeploy.onnxfile.graph import DQ, Q, attribute

LAYERS = ("Conv", "Gemm", "MatMul")
SUMS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add")
CLIPS = ("Relu", "Clip")
MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast", "MaxPool", "Flatten", "Slice")


def dequantized(subject: Subject, name: str) -> NodeProto | None:
    """The DQ behind a tensor, seen through what only moves numbers; of a Concat, that of its first operand."""
    found: list[NodeProto] = []
    todo, seen = [name], set()
    while todo:  # each tensor once: a Concat of Concats would be walked 2^n times
        at = todo.pop()
        node = subject.made_by(at, DQ, "Concat", *MOVES)
        if node is None:
            return None
        if at not in seen and node.op_type == DQ:
            found.append(node)
        elif at not in seen:
            todo += reversed(node.input if node.op_type == "Concat" else node.input[:1])
        seen.add(at)
    return found[0] if found else None


def quantised_layers(subject: Subject) -> Iterator[NodeProto]:
    """Convolutions and products both of whose operands come through DQ."""
    for node in subject.nodes(*LAYERS):
        if all(dequantized(subject, name) is not None for name in node.input[:2]):
            yield node


def _origin(subject: Subject, name: str) -> str:
    dequantize = subject.made_by(name, DQ)
    quantize = subject.made_by(dequantize.input[0], Q) if dequantize is not None else None
    return quantize.input[0] if quantize is not None else name


def _duplicates(subject: Subject) -> Iterator[tuple[Where, str]]:
    pairs: dict[str, list[NodeProto]] = defaultdict(list)
    for node in subject.nodes(Q):
        if node.input[0] not in subject.constants:
            pairs[_origin(subject, node.input[0])].append(node)
    for tensor, nodes in pairs.items():
        readers = sum(len(subject.readers[node.output[0]]) for node in nodes)
        if len(nodes) > 1 or readers > 1:
            yield tensor, f"{len(nodes)} Q, {readers} DQ"


def _split_relu(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes(*CLIPS):
        if subject.made_by(node.input[0], DQ) is None:
            continue
        maker = subject.made_by(_origin(subject, node.input[0]), *SUMS)
        if maker is not None:
            yield subject.called(node), f"behind {subject.called(maker)}"


def _int8_convs(subject: Subject) -> set[str]:
    return {node.output[0] for node in quantised_layers(subject) if node.op_type == "Conv"}


def _float_add(subject: Subject) -> Iterator[tuple[Where, str]]:
    """Adds of an INT8 convolution's result and of a tensor without a pair. Only one operand may lack it."""
    convs = _int8_convs(subject)
    for node in subject.nodes("Add"):
        origins = [_through_clip(subject, _origin(subject, name)) for name in node.input]
        if any(name in subject.constants for name in node.input) or not convs & set(origins):
            continue
        bare = [origin for name, origin in zip(node.input, origins, strict=True) if subject.made_by(name, DQ) is None]
        if len(bare) > 1 or any(origin not in convs for origin in bare):
            yield subject.called(node), ""


def _split_add(subject: Subject) -> Iterator[tuple[Where, str]]:
    """Adds of two pairs, one of them right behind an INT8 convolution that nobody else reads."""
    convs = _int8_convs(subject)
    for node in subject.nodes("Add"):
        lone = [name for name in node.input if _origin(subject, name) in convs and len(subject.readers[name]) == 1]
        if lone and all(subject.made_by(name, DQ) for name in node.input):
            yield subject.called(node), ""


def _through_clip(subject: Subject, name: str) -> str:
    node = subject.made_by(name, *CLIPS)
    return node.input[0] if node is not None else name


def _half_quantised(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes(*LAYERS, "ConvTranspose"):
        data, weights = (dequantized(subject, name) for name in node.input[:2])
        if data is None and weights is not None:
            yield subject.called(node), "data in float"
        elif data is not None and weights is None and _in_vain(subject, data):
            yield subject.called(node), "weights in float"


def _in_vain(subject: Subject, data: NodeProto) -> bool:
    """A pair that nobody else reads, and that lets no layer or residual add in front of it write INT8."""
    maker = _through_clip(subject, _origin(subject, data.output[0]))
    layers = {node.output[0] for node in quantised_layers(subject)}
    useful = maker in layers or subject.made_by(maker, "Add") is not None
    return len(subject.readers[data.output[0]]) == 1 and not useful


def _no_output_pair(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in quantised_layers(subject):
        readers = subject.readers[node.output[0]]
        tensor = readers[0].output[0] if len(readers) == 1 and readers[0].op_type in CLIPS else node.output[0]
        if tensor not in subject.outputs and [r.op_type for r in subject.readers[tensor]] != [Q]:
            yield subject.called(node), ""


def _float_operators(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes("LayerNormalization", "Softmax", "InstanceNormalization", "GroupNormalization"):
        if subject.made_by(node.input[0], DQ) is not None:
            yield subject.called(node), node.op_type


def _residual_stream(subject: Subject) -> Iterator[tuple[Where, str]]:
    norms = {_origin(subject, node.input[0]) for node in subject.nodes("LayerNormalization")}
    for node in subject.nodes("Add"):
        if node.output[0] in norms and any(subject.made_by(name, DQ) for name in node.input
                                           if _origin(subject, name) not in subject.constants):
            yield subject.called(node), ""


def _transposed(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes("ConvTranspose"):
        if all(subject.made_by(name, DQ) for name in node.input[:2]):
            yield subject.called(node), ""


def _depthwise(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in quantised_layers(subject):
        shape = subject.shape(node.input[1])
        if node.op_type == "Conv" and shape is not None and attribute(node, "group", 1) == shape[0] != 1:
            yield subject.called(node), ""


def _float_weights(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes(Q):
        if node.input[0] in subject.constants:
            yield subject.called(node), ""


RULES = (
    Rule("FMD101", "several Q or DQ on one tensor", {"tensorrt": "note", "ort": "slow"},
         "ONNX Runtime fuses an operator only with one Q and one DQ a tensor; TensorRT merges most, not all",
         "Merge them: export --from-onnx does", _duplicates,
         "ResNet-18 as modelopt exports it runs slower than FP32"),
    Rule("FMD102", "Q/DQ between a sum and its ReLU", {"tensorrt": "slow", "dla": "slow", "ort": "slow"},
         "the pair keeps the sum and the ReLU from becoming one kernel, and spends levels on what is cut off",
         "Quantise behind the ReLU only: export --from-onnx does", _split_relu,
         "docs.nvidia.com/deeplearning/tensorrt: Q/DQ placement recommendations"),
    Rule("FMD103", "residual add in float between INT8 layers", {"tensorrt": "slow", "dla": "slow", "ort": "slow"},
         "an add whose skipped operand has no pair makes the layers around it write float",
         "Quantise the operands: fmdeploy quantize does, and export --from-onnx with --calibration", _float_add,
         "ResNet-18, one thread: 29.7 ms without, 13.0 ms with"),
    Rule("FMD104", "one operand in float", {"tensorrt": "slow", "dla": "slow", "ort": "slow"},
         "a layer with one quantised operand runs in float and still pays for the conversion",
         "Quantise both operands or neither", _half_quantised, "measured with the TensorRT-RTX 1.7.1 builder: FP32"),
    Rule("FMD105", "INT8 layer whose result has no pair", {"ort": "slow"},
         "ONNX Runtime turns a convolution into an integer one only between DQ and Q",
         "Quantise the result, too, unless it is the head", _no_output_pair,
         "ResNet-18 by modelopt: 0 of 20 convolutions fuse"),
    Rule("FMD106", "Q/DQ in front of a normalisation or a softmax", {"tensorrt": "risky", "ort": "slow"},
         "these run in float anyway; the pair costs accuracy (with outliers, all of it) and buys nothing",
         "Switch the quantizer of this input off", _float_operators,
         "ViT-B with modelopt's ONNX defaults: 0.03 % top-1; github.com/onnxsim/onnxsim/pull/1742"),
    Rule("FMD107", "Q/DQ on a transformer's residual stream", {"tensorrt": "risky", "ort": "risky"},
         "its outliers (|x| of 1418 in ViT-B) take the range, and all else becomes 0",
         "Keep the sums in front of a LayerNormalization float: fmdeploy quantize decides by a probe", _residual_stream,
         "ViT-B on an Orin Nano, github.com/onnxsim/onnxsim/pull/1742"),
    Rule("FMD108", "quantised ConvTranspose", {"tensorrt": "slow", "ort": "slow"},
         "it runs in float although quantised, behind a conversion",
         "Leave it float, or replace it by Resize and Conv", _transposed,
         "measured with the TensorRT-RTX 1.7.1 builder: FP32; github.com/NVIDIA/TensorRT/issues/1699, 4366"),
    Rule("FMD109", "depthwise convolution in INT8", {"tensorrt": "note"},
         "it is bound by memory, has a range of its own in every channel, and gains little from INT8",
         "Measure it against FP16: fmdeploy quantize --max-drop keeps it float where that is cheaper", _depthwise,
         "arXiv:1806.08342, section 3"),
    Rule("FMD110", "weights stored in float", {"ort": "slow"},
         "ONNX Runtime fuses no weight that it must quantise first",
         "Store int8 weights behind a DequantizeLinear: export --from-onnx does", _float_weights,
         "ResNet-18 by modelopt: 44.9 to 55 ms against 35 in FP32"),
    Rule("FMD111", "Q/DQ between a convolution and its residual add", {"tensorrt": "slow", "dla": "slow"},
         "convolution, add and ReLU are one kernel only where nothing but the skipped operand has a pair",
         "Leave the pair behind the convolution out: export and export --from-onnx do", _split_add,
         "docs.nvidia.com/deeplearning/tensorrt: Q/DQ placement recommendations; TensorRT-RTX 1.7.1 fuses both"),
)

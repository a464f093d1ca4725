"""What each ONNX operator is to an engine: a product, a pass over memory, or nothing."""

from __future__ import annotations

from math import prod

from onnx import NodeProto

from fmdeploy.estimate.shapes import Shape
from fmdeploy.onnxfile.graph import DQ, Q, attribute

WEIGHT_OF = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "ConvInteger": 1, "MatMulInteger": 1,
             "QLinearConv": 3, "QLinearMatMul": 3}
CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv")
ALREADY_INT8 = ("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")

VIEWS = {Q, DQ, "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast", "Dropout"}
POINTWISE = {
    "Abs", "Add", "BatchNormalization", "Ceil", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu",
    "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean",
    "Min", "Mish", "Mod", "Mul", "Neg", "Not", "And", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu",
    "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu", "Where"}
TRANSCENDENTAL = {
    "Elu", "Erf", "Exp", "Gelu", "HardSwish", "Log", "Mish", "Pow", "Selu", "Sigmoid", "Softplus", "Swish", "Tanh"}
SOFTMAX = {"Softmax", "LogSoftmax"}
NORMS = {"LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization", "LpNormalization",
         "MeanVarianceNormalization"}
REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare",
              "ReduceProd", "ReduceLogSumExp", "ReduceLogSum"}
POOLS = {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool"}
COPIES = {"Slice", "Split", "Gather", "Pad", "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "GatherElements",
          "Transpose", "Concat"}


def kind_of(node: NodeProto, sizes: dict[str, Shape], weights: set[str]) -> str:
    """The kind of work of a node, in the words of `Work`; "view" costs nothing."""
    op = node.op_type
    if op in WEIGHT_OF:
        return _product_kind(node, sizes, weights)
    if op == "Einsum":
        return "gemm" if set(node.input) & weights else "matmul"
    if op in REDUCTIONS:
        inner = len(sizes[node.input[0]]) == 4 and len(sizes[node.output[0]]) in (2, 4)
        return "pool" if inner and sizes[node.output[0]][1:2] == sizes[node.input[0]][1:2] else "norm"
    for kind, ops in (("view", VIEWS), ("pointwise", POINTWISE), ("softmax", SOFTMAX), ("norm", NORMS),
                      ("pool", POOLS), ("copy", COPIES), ("resize", {"Resize", "Upsample"})):
        if op in ops:
            return kind
    return "other"


def _product_kind(node: NodeProto, sizes: dict[str, Shape], weights: set[str]) -> str:
    weight = node.input[WEIGHT_OF[node.op_type]]
    if node.op_type in (*CONVOLUTIONS, "ConvTranspose"):
        groups = attribute(node, "group", 1)
        return "depthwise" if groups > 1 and groups == sizes[node.input[0]][1] else "conv"
    return "gemm" if weight in weights or node.op_type == "Gemm" or node.input[0] in weights else "matmul"


def product(node: NodeProto, sizes: dict[str, Shape]) -> tuple[int, int, int]:
    """Multiply-adds of a whole node, length of its dot products, and outputs of one group."""
    out = sizes[node.output[0]]
    if node.op_type == "Einsum":
        return _einsum(node, sizes)
    weight = sizes[node.input[WEIGHT_OF[node.op_type]]]
    groups = attribute(node, "group", 1)
    if node.op_type in CONVOLUTIONS:
        return prod(out) * prod(weight[1:]), prod(weight[1:]), weight[0] // groups
    if node.op_type == "ConvTranspose":  # every input element meets one group's kernels
        return prod(sizes[node.input[0]]) * prod(weight[1:]), weight[0] // groups, prod(weight[1:])
    left = sizes[node.input[0]]
    inner = left[0] if attribute(node, "transA", 0) else left[-1]
    return prod(out) * inner, inner, out[-1] if out else 1


def _einsum(node: NodeProto, sizes: dict[str, Shape]) -> tuple[int, int, int]:
    terms = attribute(node, "equation").decode().replace(" ", "").split("->")
    letters: dict[str, int] = {}
    for term, name in zip(terms[0].split(","), node.input, strict=True):
        letters |= dict(zip(term.replace("...", ""), sizes[name][-len(term.replace("...", "")):], strict=False))
    out = sizes[node.output[0]]
    summed = [letter for letter in letters if letter not in (terms[1] if len(terms) > 1 else "")]
    inner = prod(letters[letter] for letter in summed)
    return prod(out) * inner, inner, out[-1] if out else 1

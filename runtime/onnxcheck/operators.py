"""Which operators a device runs: deterministic, of bounded time, with sizes that the file decides and no input does.

A superset of what `export` writes (a test holds them together). Control flow, sequences, strings, random numbers and
operators whose output size depends on data are not among them.
"""

from __future__ import annotations

_PRODUCTS = "Conv ConvTranspose Gemm MatMul Einsum"
_INTEGER = "QuantizeLinear DequantizeLinear QLinearConv QLinearMatMul ConvInteger MatMulInteger DynamicQuantizeLinear"
_POINTWISE = """
    Abs Add And BatchNormalization Ceil Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid
    HardSwish LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu
    Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Tanh ThresholdedRelu Where Xor
"""
_NORMS = """
    Softmax LogSoftmax LayerNormalization GroupNormalization InstanceNormalization RMSNormalization LpNormalization
    MeanVarianceNormalization LRN
"""
_REDUCTIONS = """
    ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceProd ReduceLogSumExp ReduceLogSum
    ArgMax ArgMin CumSum TopK MaxPool AveragePool GlobalAveragePool GlobalMaxPool LpPool GlobalLpPool
"""
_MOVES = """
    Identity Cast CastLike Reshape Flatten Squeeze Unsqueeze Shape Size Transpose Concat Split Slice Gather
    GatherElements GatherND ScatterElements ScatterND Pad Expand Tile DepthToSpace SpaceToDepth Resize GridSample
    Constant ConstantOfShape Trilu EyeLike OneHot
"""
ALLOWED = frozenset(" ".join((_PRODUCTS, _INTEGER, _POINTWISE, _NORMS, _REDUCTIONS, _MOVES)).split())
CONTROL_FLOW = frozenset(("If", "Loop", "Scan", "SequenceMap"))
DOMAINS = ("", "ai.onnx")
# Older opsets broadcast by other rules; newer ones are beyond ONNX Runtime 1.23, the last for JetPack 6's Python.
OPSETS = (7, 23)
IR_VERSIONS = (3, 11)
PRODUCTS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
Q, DQ = "QuantizeLinear", "DequantizeLinear"
# Operators that only move numbers, or change their type: a grid on one side is a grid on the other.
MOVES = frozenset(("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Concat", "Split",
                   "Slice", "Gather", "Pad", "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "MaxPool", "Resize"))

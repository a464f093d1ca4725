"""Rules for the DLA of AGX Orin and Orin NX: what falls back to the GPU without an error.

Each transition between DLA and GPU costs a copy: replacing a GroupNorm that fell back by a BatchNorm took a network
from 306 to 650 queries a second. The Orin Nano has no DLA; JetPack 7.2 ships a TensorRT without support for it.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from fmdeploy.export.lint.finding import Rule, Subject, Where
from fmdeploy.onnxfile.graph import DQ, Q, attribute

DOCUMENT = "docs.nvidia.com: DLA supported layers and restrictions"
# ONNX operators that become layers of that document's table, and those that vanish on the way.
_ON_DLA = """
    Conv ConvTranspose Gemm Relu LeakyRelu PRelu Sigmoid Tanh Clip Add Sub Mul Div Pow Max Min Equal Greater Less
    Concat MaxPool AveragePool GlobalAveragePool GlobalMaxPool LRN Resize Slice Softmax BatchNormalization ReduceMax
    Abs Sin Cos Atan Transpose Reshape Flatten Squeeze Unsqueeze Identity Constant Cast QuantizeLinear
    DequantizeLinear
"""
ON_DLA = frozenset(_ON_DLA.split())
MAX_BATCH, MAX_SIZE = 4096, 8192


def _unsupported(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.model.graph.node:
        if node.op_type not in ON_DLA:
            yield subject.called(node), node.op_type


def _pairs(subject: Subject) -> Iterator[tuple[Where, str]]:
    count = len(subject.nodes(Q, DQ))
    if count:
        yield "graph", f"{count} Q and DQ"


def _sizes(subject: Subject) -> Iterator[tuple[Where, str]]:
    for name in subject.values:
        shape = [size or 0 for size in subject.shape(name) or ()]
        if shape and (shape[0] > MAX_BATCH or max(shape[1:], default=0) > MAX_SIZE):
            yield name, f"shape {shape}"


def _float32(subject: Subject) -> Iterator[tuple[Where, str]]:
    layers = [node for node in subject.nodes("Conv", "Gemm") if subject.kind(node.output[0]) == TensorProto.FLOAT
              and subject.made_by(node.input[0], DQ) is None]
    if layers:
        yield subject.called(layers[0]), f"{len(layers)} layers"


def _conv_limits(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes("Conv", "ConvTranspose"):
        shape = [size or 0 for size in subject.shape(node.input[1]) or ()]
        kernel = list(attribute(node, "kernel_shape", shape[2:]))
        pads = list(attribute(node, "pads", ()))
        strides, dilations = list(attribute(node, "strides", ())), list(attribute(node, "dilations", ()))
        transposed = node.op_type == "ConvTranspose"
        problem = ("kernel above 32" if any(size > 32 for size in kernel) else
                   "padding above 31" if any(size > 31 for size in pads) else
                   "dilation above 32" if any(size > (1 if transposed else 32) for size in dilations) else
                   "stride above 8" if not transposed and any(size > 8 for size in strides) else
                   "padding of a transposed convolution" if transposed and any(pads) else
                   "not two-dimensional" if len(kernel) != 2 else "")
        if problem:
            yield subject.called(node), problem


RULES = (
    Rule("FMD401", "layer that the DLA does not have", {"dla": "slow"},
         "it runs on the GPU instead, without an error, and the data goes there and back",
         "Replace it, or leave the network on the GPU: count transitions in the engine inspector", _unsupported,
         DOCUMENT),
    Rule("FMD402", "Q/DQ on the DLA", {"dla": "risky"},
         "NVIDIA's guides to TensorRT 8 say that the DLA takes no explicit quantisation; 11.4.1 on AGX Orin does",
         "Prove the placement with the engine inspector on the device, or use the FP16 file", _pairs,
         "docs.nvidia.com: working with DLA"),
    Rule("FMD403", "tensor that is too large for the DLA", {"dla": "slow"},
         f"batches go up to {MAX_BATCH}, other sizes up to {MAX_SIZE}: beyond, the layer runs on the GPU",
         "Use smaller tensors", _sizes, DOCUMENT),
    Rule("FMD404", "FP32 layers", {"dla": "slow"},
         "the DLA computes in FP16 and INT8: a layer typed FP32 runs on the GPU", "Use model.fp16.onnx", _float32,
         DOCUMENT),
    Rule("FMD405", "convolution outside the DLA's limits", {"dla": "slow"},
         "kernels up to 32, padding up to 31, strides up to 8, dilations up to 32, two-dimensional: others fall back",
         "Use smaller kernels", _conv_limits, DOCUMENT),
)

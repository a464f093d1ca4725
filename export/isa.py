"""What the CPU's integer multiply does: without VNNI, x86 adds pairs of U8S8 products in 16 bits and saturates.

`vpmaddubsw` (AVX2, AVX-512 without VNNI) sums two products of an unsigned and a signed byte into a signed 16-bit
number: 255 * 127 * 2 = 64770 does not fit into 32767. A published ResNet-50 falls from 74.8 % to 69.0 % that way.
Behind a ReLU our unsigned activations use zero point 0 and stay at or below 127 inside the calibrated range:
127 * 128 * 2 = 32512 fits. Only a layer that reads a tensor with zero point 128 can saturate there.

`--cpu x86-64` takes VNNI for granted, and refuses to be measured on a CPU that has none; `--cpu x86-64-avx2` stores the
weights of the layers in question with 7 bits instead: 255 * 64 * 2 = 32640 fits on any x86.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from onnx import ModelProto, NodeProto

from fmdeploy.cpu import this_cpu
from fmdeploy.errors import ModelFileError
from fmdeploy.onnxfile.graph import DQ, Array, Graph, attribute

CpuKind = Literal["x86-64", "x86-64-avx2", "arm64"]
INT16_MAX = 32767
LAYERS = ("Conv", "Gemm", "MatMul")


def saturating_layers(model: ModelProto) -> tuple[str, ...]:
    """Name the layers of a uint8 dialect that can saturate on x86 without VNNI, at worst, inside calibrated ranges."""
    graph = Graph(model)
    return tuple(node.name for node in graph.nodes(*LAYERS) if _largest_pair(graph, node) > INT16_MAX)


def narrow_weights(model: ModelProto) -> tuple[str, ...]:
    """Store the weights of `saturating_layers` with 7 bits, in place: twice the scale, levels in [-64, 63].

    Returns:
        Names of the layers whose weights changed. Their grid is 6 dB coarser.
    """
    names = saturating_layers(model)
    graph = Graph(model)
    for node in graph.nodes(*LAYERS):
        dequantize = graph.maker.get(node.input[1]) if node.name in names else None
        if dequantize is None or dequantize.input[0].endswith("_7bit"):  # shared, and already narrow
            continue
        levels, scale = graph.constants[dequantize.input[0]], graph.constants[dequantize.input[1]]
        halved = np.clip(np.rint(levels.astype(np.float32) / 2), -64, 63).astype(np.int8)
        dequantize.input[0] = graph.set_constant(f"{dequantize.input[0]}_7bit", halved)
        dequantize.input[1] = graph.set_constant(f"{dequantize.input[1]}_{dequantize.name}_7bit", scale * 2)
    graph.drop_unused()
    return names


def require_exact(saturating: tuple[str, ...]) -> None:
    """Refuse to measure on a CPU that would saturate: its numbers would speak for no other machine.

    Raises:
        ModelFileError: names the first layer.
    """
    cpu = this_cpu()
    if saturating and not cpu.exact_int8:
        raise ModelFileError("8-bit products of this layer saturate on this CPU", where=saturating[0], found=str(cpu),
                             fix="Give --cpu x86-64-avx2 to store such weights with 7 bits, or use a CPU with VNNI")


def _largest_pair(graph: Graph, node: NodeProto) -> float:
    """Largest possible |a1 w1 + a2 w2| of one layer; 0 where the layer does not run in U8S8."""
    data, weight = (graph.maker.get(name) for name in node.input[:2])
    if data is None or weight is None or data.op_type != DQ or weight.op_type != DQ:
        return 0.0
    zero = graph.constants[data.input[2]]
    levels = graph.constants.get(weight.input[0])
    if zero.dtype != np.uint8 or levels is None:
        return 0.0
    largest = 127 if int(zero) == 0 else 255
    scales = graph.constants.get(weight.input[1], np.ones(1))
    axis = int(attribute(weight, "axis", 1))  # ONNX's default
    return float(largest * _two_largest(levels, axis if scales.size > 1 else None))


def _two_largest(levels: Array, axis: int | None) -> int:
    """Sum of the two largest |w| of any output channel. Which two weights meet depends on the packing: the worst.

    Args:
        levels: int8 weights.
        axis: Of the output channels: 0 in (out, in, ...), 1 in a MatMul's (in, out); None where one scale serves
            all channels, and the axis is not said: the worst of the whole tensor.
    """
    sizes = np.abs(levels.astype(np.int32))
    rows = sizes.reshape(1, -1) if axis is None else np.moveaxis(sizes, axis, 0).reshape(levels.shape[axis], -1)
    return int(np.sort(rows, axis=1)[:, -2:].sum(axis=1).max())

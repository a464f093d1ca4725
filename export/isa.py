"""What the CPU's integer multiply does: without VNNI, x86 adds pairs of U8S8 products in 16 bits and saturates.

`vpmaddubsw` (AVX2, AVX-512 without VNNI) sums two products of an unsigned and a signed byte into a signed 16-bit
number: 255 * 127 * 2 = 64770 does not fit into 32767. A published ResNet-50 falls from 74.8 % to 69.0 % that way.
Behind a ReLU our unsigned activations use zero point 0 and stay at or below 127 inside the calibrated range:
127 * 128 * 2 = 32512 fits. Only a layer that reads a tensor with zero point 128 can saturate there.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto

from fmdeploy.onnxfile.graph import DQ, Array, Graph

INT16_MAX = 32767
LAYERS = ("Conv", "Gemm", "MatMul")


def saturating_layers(model: ModelProto) -> tuple[str, ...]:
    """Name the layers of a uint8 dialect that can saturate on x86 without VNNI, at worst, inside calibrated ranges."""
    graph = Graph(model)
    return tuple(node.name for node in graph.nodes(*LAYERS) if _largest_pair(graph, node) > INT16_MAX)


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
    axis = next((int(attribute.i) for attribute in weight.attribute if attribute.name == "axis"), 1)  # ONNX's default
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

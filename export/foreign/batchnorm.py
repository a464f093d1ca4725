"""BatchNormalization behind a quantised convolution, folded into its weights without changing one INT8 level.

w * g for one factor g an output channel keeps round(w / s) when the scale becomes s * |g|; a negative g only turns the
sign. So the fold is exact (but for a level of -128 whose sign turns), and both runtimes fuse the convolution with what
follows. Where the convolution's result has a pair of its own, the grid stands between the two: nothing is folded.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, helper

from fmdeploy.export.foreign.changes import Log
from fmdeploy.onnxfile.graph import DQ, Array, Graph, Q, attribute


def fold_batchnorms(graph: Graph, log: Log) -> None:
    """Fold every BatchNormalization that can be; the others are named as staying float."""
    gone = []
    for node in graph.nodes("BatchNormalization"):
        conv = graph.maker.get(node.input[0])
        quantize = _weight(graph, conv) if conv is not None else None
        numbers = [graph.constants.get(name) for name in node.input[1:5]]
        if conv is None or quantize is None or any(v is None for v in numbers):
            log.stays_float.append((node.name, "a BatchNormalization that no quantised convolution alone feeds"))
            continue
        gamma, beta, mean, variance = (np.asarray(v, np.float64) for v in numbers)
        factor = gamma / np.sqrt(variance + float(attribute(node, "epsilon", 1e-5)))
        if not np.all(factor):
            log.stays_float.append((node.name, "a BatchNormalization with a factor of 0"))
            continue
        _scale_weight(graph, conv, quantize, factor)
        bias = graph.constants[conv.input[2]] if len(conv.input) > 2 else np.zeros(())
        name = graph.set_constant(f"{conv.name}_folded_bias", ((bias - mean) * factor + beta).astype(np.float32))
        del conv.input[2:]
        conv.input.append(name)
        graph.redirect(node.output[0], conv.output[0])
        gone.append(node)
    graph.remove(gone)
    graph.drop_unused()


def _weight(graph: Graph, conv: NodeProto) -> NodeProto | None:
    """The Q of the weights of a convolution whose result and weights nobody else reads; None where it cannot fold."""
    if conv.op_type != "Conv" or len(graph.readers[conv.output[0]]) != 1 or conv.output[0] in graph.outputs:
        return None
    dequantize = graph.maker.get(conv.input[1])
    quantize = graph.maker.get(dequantize.input[0]) if dequantize is not None and dequantize.op_type == DQ else None
    if dequantize is None or quantize is None or quantize.op_type != Q or quantize.input[0] not in graph.constants:
        return None
    alone = len(graph.readers[dequantize.output[0]]) == 1 and len(graph.readers[quantize.output[0]]) == 1
    constant_bias = len(conv.input) < 3 or conv.input[2] in graph.constants
    reader = graph.readers[conv.output[0]][0]
    return quantize if alone and constant_bias and reader.input[0] == conv.output[0] else None


def _scale_weight(graph: Graph, conv: NodeProto, quantize: NodeProto, factor: Array) -> None:
    dequantize = graph.maker[conv.input[1]]
    weight, scale = graph.constants[quantize.input[0]], graph.constants[quantize.input[1]]
    shape = (-1, *(1,) * (weight.ndim - 1))
    scales = (np.broadcast_to(scale, factor.shape) * np.abs(factor)).astype(np.float32)
    names = [graph.set_constant(f"{conv.name}_folded_scale", scales),
             graph.set_constant(f"{conv.name}_folded_zero", np.zeros(scales.shape, np.int8))]
    quantize.input[0] = graph.set_constant(f"{conv.name}_folded", (weight * factor.reshape(shape)).astype(np.float32))
    for node in (quantize, dequantize):
        del node.input[1:]
        node.input.extend(names)
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("axis", 0))

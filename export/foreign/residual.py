"""Residual adds that the source left in float: found, and with calibration data given the pairs that they lack.

modelopt quantises the inputs of layers only. An add in float between two INT8 convolutions keeps ONNX Runtime from
fusing either (ResNet-18: 29.7 ms against 13.0 with pairs on the adds) and costs TensorRT two reformats. Adds on a
transformer's residual stream stay float on purpose: its outliers do not fit 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from onnx import ModelProto, NodeProto, helper

from fmdeploy.arrays import Arrays
from fmdeploy.errors import DataError
from fmdeploy.export.foreign.activations import add_pair
from fmdeploy.export.foreign.changes import Log
from fmdeploy.onnxfile.graph import DQ, Graph, Q
from fmdeploy.onnxfile.session import cpu_session
from fmdeploy.onnxfile.tidy import sort_nodes

PASSES = ("Relu", "Clip", "BatchNormalization", "MaxPool")


def float_adds(graph: Graph) -> list[NodeProto]:
    """Adds of two activations, one of them the result of an INT8 convolution, that lack a pair on any side."""
    return [node for node in graph.nodes("Add") if _is_residual(graph, node) and _lacking(graph, node)]


def complete_adds(graph: Graph, batches: Iterable[Arrays] | None, log: Log) -> None:
    """Give the float residual adds pairs with measured ranges; without data, name each one.

    Args:
        graph: Canonical; changed in place.
        batches: Calibration inputs as the model takes them; None to measure nothing.
        log: Told about every tensor, or every add that stays float.
    """
    adds = float_adds(graph)
    if batches is None:
        log.stays_float += [(node.name, "a residual add without Q/DQ: give --calibration to measure its ranges")
                            for node in adds]
        return
    tensors = list(dict.fromkeys(name for node in adds for name in _lacking(graph, node)))
    if not adds:
        return
    largest = largest_values(graph.model, tensors, batches)
    for tensor in tensors:
        if not largest[tensor] > 0:
            raise DataError("is 0 on every calibration sample", where=tensor, fix="Give data that reaches this layer")
        scale = _scale(largest[tensor])
        add_pair(graph, tensor, scale, [])
        log.change(tensor, f"pair added, measured range {largest[tensor]:.4g}")
    graph.refresh()
    for node in graph.nodes("Add"):
        if any(node.name == add.name for add in adds):
            _connect(graph, node)
    sort_nodes(graph.model)
    graph.refresh()


def largest_values(model: ModelProto, tensors: list[str], batches: Iterable[Arrays]) -> dict[str, float]:
    """Largest |value| of each tensor over all batches, as the model is written (no graph optimisation)."""
    shown = ModelProto()
    shown.CopyFrom(model)
    named = {value.name for value in shown.graph.output}
    shown.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in tensors if name not in named)
    session = cpu_session(shown.SerializeToString(), optimise=False)
    largest = dict.fromkeys(tensors, 0.0)
    for feeds in batches:
        for name, values in zip(tensors, session.run(tensors, feeds), strict=True):
            largest[name] = max(largest[name], float(np.abs(values).max(initial=0.0)))
    return largest


def _is_residual(graph: Graph, node: NodeProto) -> bool:
    if any(name in graph.constants for name in node.input):
        return False
    return any(_from_int8_conv(graph, name) for name in node.input)


def _from_int8_conv(graph: Graph, tensor: str) -> bool:
    node = graph.maker.get(_base(graph, tensor))
    while node is not None and node.op_type in PASSES:
        node = graph.maker.get(_base(graph, node.input[0]))
    return node is not None and node.op_type == "Conv" and all(
        (maker := graph.maker.get(name)) is not None and maker.op_type == DQ for name in node.input[:2])


def _base(graph: Graph, tensor: str) -> str:
    """The tensor behind a Q/DQ pair."""
    node = graph.maker.get(tensor)
    if node is None or node.op_type != DQ:
        return tensor
    quantize = graph.maker.get(node.input[0])
    return str(quantize.input[0]) if quantize is not None and quantize.op_type == Q else tensor


def _result(graph: Graph, node: NodeProto) -> str:
    """The tensor that an add really makes: that of the ReLU which alone reads it."""
    readers = graph.readers[node.output[0]]
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip") and node.output[0] not in graph.outputs:
        return str(readers[0].output[0])
    return str(node.output[0])


def _lacking(graph: Graph, node: NodeProto) -> list[str]:
    """Tensors around an add that have no pair; nothing for an add that makes an output of the model."""
    result = _result(graph, node)
    if result in graph.outputs:
        return []
    tensors = [*(_base(graph, name) for name in node.input), result]
    return [name for name in tensors if not _quantizer(graph, name)]


def _quantizer(graph: Graph, tensor: str) -> NodeProto | None:
    return next((reader for reader in graph.readers[tensor] if reader.op_type == Q), None)


def _connect(graph: Graph, node: NodeProto) -> None:
    """Let the add, and everyone behind it, read the pairs."""
    for k, name in enumerate(node.input):
        node.input[k] = _dequantized(graph, _base(graph, name))
    result = _result(graph, node)
    for reader in graph.readers[result]:
        if reader.op_type != Q:
            for k, name in enumerate(reader.input):
                if name == result:
                    reader.input[k] = _dequantized(graph, result)


def _dequantized(graph: Graph, tensor: str) -> str:
    quantize = _quantizer(graph, tensor)
    if quantize is None:
        raise AssertionError(f"{tensor} has no pair")
    return next(str(node.output[0]) for node in graph.readers[quantize.output[0]] if node.op_type == DQ)


def _scale(largest: float) -> float:
    """The smallest float16 number that is not below largest / 127, so that a file of FP16 type has the same grid."""
    scale = np.float16(largest / 127)
    if float(scale) * 127 < largest:
        scale = np.nextafter(scale, np.float16(np.inf))
    return float(scale) if 0 < float(scale) < np.inf else largest / 127

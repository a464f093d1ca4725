"""Pairs moved through operators that only move numbers: pooling by maximum, concatenation, reshaping.

Such an operator and a Q/DQ pair commute, so a second pair with the same scale on its other side changes no number. Both
runtimes fuse a layer only with a pair next to it: NNCF writes none behind a Concat, modelopt none before a MaxPool.
"""

from __future__ import annotations

from onnx import NodeProto

from fmdeploy.export.foreign.activations import add_pair
from fmdeploy.export.foreign.changes import Log
from fmdeploy.onnxfile.graph import DQ, Graph, Q, attribute
from fmdeploy.onnxfile.tidy import sort_nodes

MOVES = ("MaxPool", "Concat", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "DepthToSpace",
         "SpaceToDepth", "Resize", "GlobalMaxPool")
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
CLIPS = ("Relu", "Clip")


def spread_pairs(graph: Graph, log: Log) -> None:
    """Give both sides of moving operators the pair that one side has, where a layer gains by it."""
    while any(_backward(graph, node) or _forward(graph, node, log) for node in graph.nodes(*MOVES) if _moves(node)):
        sort_nodes(graph.model)  # copies the nodes: one change at a time
        graph.refresh()


def _moves(node: NodeProto) -> bool:
    return node.op_type != "Resize" or attribute(node, "mode", b"nearest") == b"nearest"


def _operands(node: NodeProto) -> list[str]:
    return list(node.input) if node.op_type == "Concat" else [node.input[0]]


def _backward(graph: Graph, node: NodeProto) -> bool:
    """The result has a pair: give it to an operand that an INT8 layer makes for this reader alone."""
    quantize = _quantizer(graph, node.output[0])
    if quantize is None or node.output[0] in graph.outputs:
        return False
    lone = [name for name in _operands(node) if _wants_pair(graph, name)]
    for name in dict.fromkeys(lone):
        add_pair(graph, name, float(graph.constants[quantize.input[1]]), [node])
    return bool(lone)


def _wants_pair(graph: Graph, name: str) -> bool:
    if name in graph.outputs or len(graph.readers[name]) != 1 or _quantizer(graph, name) is not None:
        return False
    maker = graph.maker.get(name)
    while maker is not None and maker.op_type in CLIPS:
        maker = graph.maker.get(maker.input[0])
    if maker is None or maker.op_type == DQ:
        return False
    return (maker.op_type in MOVES and _moves(maker)) or _is_int8(graph, maker)


def _is_int8(graph: Graph, node: NodeProto) -> bool:
    return node.op_type in LAYERS and all(
        (maker := graph.maker.get(name)) is not None and maker.op_type == DQ for name in node.input[:2])


def _forward(graph: Graph, node: NodeProto, log: Log) -> bool:
    """Every operand has the same pair: give it to the result that a layer reads."""
    result = node.output[0]
    readers = graph.readers[result]
    if _quantizer(graph, result) is not None or not any(_reads_as_data(reader, result) for reader in readers):
        return False
    scales = set()
    for name in _operands(node):
        maker = graph.maker.get(name)
        if maker is None or maker.op_type != DQ or maker.input[0] in graph.constants or _is_weight(graph, maker):
            return False
        scales.add(float(graph.constants[maker.input[1]]))
    if len(scales) > 1:
        reason = (node.name, f"a {node.op_type} of tensors with scales of their own: its readers get float")
        log.stays_float += [] if reason in log.stays_float else [reason]
        return False
    add_pair(graph, result, scales.pop(), list(readers))
    return True


def _is_weight(graph: Graph, dequantize: NodeProto) -> bool:
    quantize = graph.maker.get(dequantize.input[0])
    return quantize is None or quantize.input[0] in graph.constants


def _reads_as_data(node: NodeProto, tensor: str) -> bool:
    return (node.op_type in LAYERS and node.input[0] == tensor) or node.op_type in MOVES


def _quantizer(graph: Graph, tensor: str) -> NodeProto | None:
    return next((reader for reader in graph.readers[tensor] if reader.op_type == Q), None)

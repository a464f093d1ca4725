"""Activations of a foreign file in canonical form: one Q and one DQ a tensor, int8, zero point 0, one scale.

Grids that TensorRT cannot hold are covered: the new range contains the old one, so nothing is clipped that was not,
and the steps become coarser by what the log says. uint8 with zero point 0 over [0, 255 s] costs 6.1 dB: TensorRT reads
such a file without a word as int8 and clips at 127 s.

A grid without negative values may stand for a ReLU: ONNX Runtime's quantiser removes the node where the zero point does
its work. There the ReLU is written out again.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from onnx import NodeProto, helper

from fmdeploy.errors import ModelFileError
from fmdeploy.export.dialects import is_non_negative
from fmdeploy.export.foreign.changes import Log
from fmdeploy.export.foreign.grid import Grid, cost_db, grid_of
from fmdeploy.onnxfile.graph import DQ, Graph, Q, attribute
from fmdeploy.onnxfile.structure import label
from fmdeploy.onnxfile.tidy import sort_nodes

SUMS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "BatchNormalization")


def canonical_activations(graph: Graph, log: Log) -> frozenset[str]:
    """Rewrite every quantised activation; see the module.

    Returns:
        The model inputs whose own grid in the source had no negative values.

    Raises:
        ModelFileError: names the node whose levels are read by something that is no DequantizeLinear.
    """
    _drop_splits(graph, log)
    _drop_second_pairs(graph, log)
    pairs: dict[str, list[tuple[NodeProto, Grid]]] = defaultdict(list)
    for node in graph.nodes(Q):
        if node.input[0] not in graph.constants:
            pairs[_origin(graph, node.input[0])].append((node, _checked_grid(graph, node)))
    _require_makers(graph)
    positive = {tensor for tensor, found in pairs.items()
                if tensor in graph.inputs and all(np.all(grid.low >= 0) for _, grid in found)}
    gone: list[NodeProto] = []  # removed together: removing copies nodes, and would leave ours behind
    for tensor, found in pairs.items():
        scale = _common_scale(tensor, [grid for _, grid in found], log)
        source = tensor
        if all(np.all(grid.low >= 0) for _, grid in found) and not is_non_negative(graph, tensor, graph.inputs):
            source = _write_relu(graph, tensor, log)
        gone += _one_pair(graph, source, [node for node, _ in found], scale)
    graph.remove(gone)
    graph.drop_unused()
    sort_nodes(graph.model)
    graph.refresh()
    return frozenset(positive)


def _drop_second_pairs(graph: Graph, log: Log) -> None:
    """Remove the pair on a constant that has one already, as optimisers leave it where two layers share a weight."""
    gone: list[NodeProto] = []
    for node in graph.nodes(Q):
        if node.input[0] in graph.constants or _origin(graph, node.input[0]) not in graph.constants:
            continue
        for reader in graph.readers[node.output[0]]:
            if reader.op_type == DQ and reader.output[0] not in graph.outputs:
                graph.redirect(reader.output[0], node.input[0])
                gone.append(reader)
        gone.append(node)
        log.change(_origin(graph, node.input[0]), "second pair on a constant removed")
    graph.remove(gone)


def _write_relu(graph: Graph, tensor: str, log: Log) -> str:
    result = f"{tensor}_relu"
    graph.model.graph.node.append(helper.make_node("Relu", [tensor], [result], name=f"{tensor}_relu_of_zero_point"))
    log.change(tensor, "ReLU that the zero point stood for written out")
    return result


def add_pair(graph: Graph, tensor: str, scale: float, readers: list[NodeProto]) -> None:
    """Put a new Q/DQ pair on `tensor` and let `readers` read it; the caller sorts the nodes."""
    levels, values = f"{tensor}_levels", f"{tensor}_dequantized"
    names = [graph.set_constant(f"{tensor}_scale", np.asarray(scale, np.float32)),
             graph.set_constant(f"{tensor}_zero", np.zeros((), np.int8))]
    graph.model.graph.node.extend([helper.make_node(Q, [tensor, *names], [levels], name=f"{tensor}_quantize"),
                                   helper.make_node(DQ, [levels, *names], [values], name=f"{tensor}_dequantize")])
    for node in readers:
        for k, name in enumerate(node.input):
            if name == tensor:
                node.input[k] = values


def _origin(graph: Graph, tensor: str) -> str:
    """The tensor that was quantised, seen through a DQ: a Q that reads a DQ quantises the same tensor again."""
    while (node := graph.maker.get(tensor)) is not None and node.op_type == DQ:
        quantize = graph.maker.get(node.input[0])
        if quantize is None or quantize.op_type != Q:
            break
        tensor = quantize.input[0]
    return tensor


def _checked_grid(graph: Graph, node: NodeProto) -> Grid:
    grid = grid_of(graph, node)
    if node.output[0] in graph.outputs:
        raise ModelFileError("hands 8-bit levels out of the model", where=label(node), fix="End it with floats")
    for reader in graph.readers[node.output[0]]:
        if reader.op_type != DQ:
            raise ModelFileError(f"has its 8-bit levels read by {reader.op_type}", where=label(node),
                                 expected=DQ, fix="Write it in Q/DQ form, where every operator reads floats")
        if not grid.same(grid_of(graph, reader)):
            raise ModelFileError("reads levels with another scale or zero point than they were made with",
                                 where=label(reader), fix="Quantise it again")
    return grid


def _require_makers(graph: Graph) -> None:
    for node in graph.nodes(DQ):
        maker = graph.maker.get(node.input[0])
        if node.input[0] not in graph.constants and (maker is None or maker.op_type != Q):
            raise ModelFileError("reads 8-bit values that no QuantizeLinear made", where=label(node),
                                 fix="Quantise inside the file, from float inputs")


def _common_scale(tensor: str, grids: list[Grid], log: Log) -> float:
    """One scale whose int8 grid covers all of them."""
    scale = max(float(np.max(grid.covering_scale())) for grid in grids)
    if not all(grid.is_symmetric and grid.scale.size == 1 and float(grid.scale) == scale for grid in grids):
        finest = min(grids, key=lambda grid: float(np.min(grid.scale)))
        log.change(tensor, _why(grids, finest), max(0.0, cost_db(finest, np.asarray(scale))))
    return scale


def _why(grids: list[Grid], finest: Grid) -> str:
    if not all(grid.same(grids[0]) for grid in grids):
        return "readers with grids of their own share one now"
    if finest.scale.size > 1:
        return "one scale a channel became one a tensor"
    return (f"range [{float(finest.low):.4g}, {float(finest.high):.4g}] with zero point {int(finest.zero)} became "
            "symmetric")


def _one_pair(graph: Graph, tensor: str, quantizers: list[NodeProto], scale: float) -> list[NodeProto]:
    """Let everyone who read any pair of `tensor` read one; returns the nodes that are left over."""
    levels = {node.output[0] for node in quantizers}
    pairs = [node for node in graph.nodes(DQ) if node.input[0] in levels]
    if not pairs:
        return quantizers
    first, kept = quantizers[0], next((node for node in pairs if node.output[0] in graph.outputs), pairs[0])
    others = [node for node in pairs if node.output[0] != kept.output[0]]
    for node in others:
        graph.redirect(node.output[0], kept.output[0])
        if node.output[0] in graph.outputs:  # a second output of the same values
            node.CopyFrom(helper.make_node("Identity", [kept.output[0]], [node.output[0]], name=node.name))
    names = [graph.set_constant(f"{first.name}_scale", np.asarray(scale, np.float32)),
             graph.set_constant(f"{first.name}_zero", np.zeros((), np.int8))]
    for node, source in ((first, tensor), (kept, first.output[0])):
        del node.input[:]
        node.input.extend([source, *names])
        del node.attribute[:]
    return [*quantizers[1:], *(node for node in others if node.output[0] not in graph.outputs)]


def _drop_splits(graph: Graph, log: Log) -> None:
    """Remove the pair between a sum and its ReLU where the result has one: both runtimes fuse only without it."""
    gone: list[NodeProto] = []
    for node in graph.nodes("Relu", "Clip"):
        dequantize = graph.maker.get(node.input[0])
        quantize = graph.maker.get(dequantize.input[0]) if dequantize is not None and dequantize.op_type == DQ else None
        maker = graph.maker.get(quantize.input[0]) if quantize is not None else None
        if dequantize is None or quantize is None or maker is None or maker.op_type not in SUMS:
            continue
        alone = all(len(graph.readers[name]) == 1 and name not in graph.outputs
                    for name in (quantize.input[0], quantize.output[0], dequantize.output[0]))
        quantised = any(reader.op_type == Q for reader in graph.readers[node.output[0]])
        if alone and quantised and _cuts_at_zero(graph, node):
            node.input[0] = quantize.input[0]
            gone += [quantize, dequantize]
            log.change(quantize.input[0], f"pair between {maker.op_type} and {node.op_type} removed")
    graph.remove(gone)


def _cuts_at_zero(graph: Graph, node: NodeProto) -> bool:
    if node.op_type == "Relu":
        return True
    low = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    return low is not None and float(low) == 0 and attribute(node, "min") is None

"""Constants of a foreign file in canonical form: float initialiser -> Q -> DQ, int8, zero point 0; float biases.

Stored INT8 levels come back as `level * scale`: quantising that gives the same level. What has a zero point or one
scale for several output channels in the wrong direction gets a new scale a channel.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, helper

from fmdeploy.errors import ModelFileError
from fmdeploy.export.foreign.changes import Log
from fmdeploy.export.foreign.grid import Grid, cost_db, grid_of
from fmdeploy.onnxfile.graph import DQ, Array, Graph, Q, along, attribute
from fmdeploy.onnxfile.structure import label

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def canonical_constants(graph: Graph, log: Log) -> None:
    """Rewrite every quantised constant; see the module.

    Raises:
        ModelFileError: names the node whose constant cannot be spelled.
    """
    _fold_biases(graph)
    for node in graph.nodes(DQ):
        maker = graph.maker.get(node.input[0])
        root = maker.input[0] if maker is not None and maker.op_type == Q else node.input[0]
        if root in graph.constants:
            _rewrite(graph, node, maker, root, log)
    graph.remove([node for node in graph.nodes(Q)
                  if not graph.readers[node.output[0]] and node.output[0] not in graph.outputs])
    graph.drop_unused()


def _fold_biases(graph: Graph) -> None:
    """Turn INT32 constants behind a DequantizeLinear into float32, the one form of a bias that TensorRT reads."""
    gone = []
    for node in graph.nodes(DQ):
        stored, scale = graph.constants.get(node.input[0]), graph.constants.get(node.input[1])
        if stored is None or stored.dtype != np.int32:
            continue
        if scale is None:
            raise ModelFileError("computes its scale at run time", where=label(node), fix="Quantise statically")
        value = stored.astype(np.float64) * along(scale, stored.ndim, attribute(node, "axis", 1))
        graph.redirect(node.output[0], graph.set_constant(f"{node.output[0]}_float", value.astype(np.float32)))
        gone.append(node)
    graph.remove(gone)


def _rewrite(graph: Graph, node: NodeProto, quantize: NodeProto | None, root: str, log: Log) -> None:
    grid, stored = grid_of(graph, node), graph.constants[root]
    axis = None if grid.axis is None else grid.axis % max(stored.ndim, 1)
    floats = stored.dtype.kind == "f"
    if floats and quantize is not None and not grid.same(grid_of(graph, quantize)):
        raise ModelFileError("reads levels with another scale than they were made with", where=label(node),
                             fix="Quantise it again")
    if not floats and quantize is not None:
        raise ModelFileError("quantises a constant that is no float", where=label(quantize), fix="Export it again")
    scale, zero = (along(v, stored.ndim, axis or 0) for v in (grid.scale, grid.zero))
    levels = np.clip(np.rint(stored / scale) + zero, grid.lowest, grid.highest) if floats else stored
    exact = (levels.astype(np.float32) - zero) * scale
    wanted = _output_axis(graph, node, stored)
    if grid.is_symmetric and (axis is None or wanted is None or axis == wanted):
        values, new_scale, new_axis = (stored if floats else exact), grid.scale, axis
    else:
        values, new_axis = exact, wanted
        new_scale = _fresh_scale(exact, wanted)
        log.change(root, "constant re-gridded with zero point 0" + ("" if wanted is None else " a channel"),
                   _constant_cost(new_scale, grid))
    _write(graph, node, root, np.asarray(values, np.float32), new_scale, new_axis)


def _fresh_scale(values: Array, axis: int | None) -> Array:
    others = tuple(k for k in range(values.ndim) if k != axis) if axis is not None else None
    largest = np.abs(values).max(axis=others)
    return np.asarray(np.maximum(largest, np.finfo(np.float32).tiny * 127 * 2) / 127, np.float32)


def _constant_cost(scale: Array, old: Grid) -> float:
    """Loss in dB against the coarsest old step; a scale a channel is often the finer one: nothing is lost."""
    return max(0.0, cost_db(Grid(np.max(old.scale), np.zeros(()), -128, 127), scale))


def _output_axis(graph: Graph, node: NodeProto, stored: Array) -> int | None:
    """Axis of the output channels of the layer that reads this constant; None where there is not just one."""
    axes: set[int | None] = set()
    for reader, order in _readers(graph, node.output[0], list(range(stored.ndim))):
        if reader.op_type not in LAYERS:
            axes.add(None)
            continue
        axis = _channel_axis(reader, len(order), grouped=int(attribute(reader, "group", 1)) > 1)
        axes.add(None if axis is None else order[axis])
    return axes.pop() if len(axes) == 1 else None


def _readers(graph: Graph, tensor: str, order: list[int]) -> list[tuple[NodeProto, list[int]]]:
    """Readers of a constant, through Transpose, each with the order in which it sees the constant's axes."""
    found: list[tuple[NodeProto, list[int]]] = []
    for reader in graph.readers[tensor]:
        if reader.op_type == "Transpose":
            perm = list(attribute(reader, "perm", list(reversed(order))))
            found += _readers(graph, reader.output[0], [order[k] for k in perm])
        else:
            found.append((reader, order))
    return found


def _channel_axis(reader: NodeProto, rank: int, *, grouped: bool) -> int | None:
    if reader.op_type == "Conv":
        return 0
    if reader.op_type == "ConvTranspose":
        return None if grouped else 1
    if reader.op_type == "Gemm":
        return 0 if attribute(reader, "transB", 0) else 1
    return rank - 1 if rank > 1 else None  # MatMul (..., in, out)


def _write(graph: Graph, node: NodeProto, root: str, values: Array, scale: Array, axis: int | None) -> None:
    """Replace what feeds `node` by float -> Q, with constants of its own; the DQ itself stays and keeps its name."""
    base = f"{node.name}"
    weight = graph.set_constant(f"{root}_{base}_float", values)
    scale_name = graph.set_constant(f"{base}_scale", scale)
    zero_name = graph.set_constant(f"{base}_zero", np.zeros(scale.shape, np.int8))
    levels = f"{base}_levels"
    quantize = helper.make_node(Q, [weight, scale_name, zero_name], [levels], name=f"{base}_quantize")
    del node.input[:]
    node.input.extend([levels, scale_name, zero_name])
    del node.attribute[:]
    if axis is not None and scale.size > 1:
        for one in (quantize, node):
            one.attribute.append(helper.make_attribute("axis", axis))
    place = next(k for k, other in enumerate(graph.model.graph.node) if other.name == node.name)
    graph.model.graph.node.insert(place, quantize)
    graph.refresh()

"""Small rewrites that change no number: what different exporters write in different ways, written in one way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fmdeploy.onnxfile.graph import Array, Graph, attribute

CONSTANTS = {  # attributes of Constant, and the type that each one stands for
    "value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64,
}


def constant_value(node: NodeProto) -> Array | None:
    """The array that a Constant node makes; None for strings."""
    tensor = attribute(node, "value")
    if isinstance(tensor, TensorProto):
        return numpy_helper.to_array(tensor)
    for name, kind in CONSTANTS.items():
        if (value := attribute(node, name)) is not None:
            return np.asarray(value, kind)
    return None


def constants_to_initialisers(graph: Graph) -> None:
    """Turn Constant nodes into initialisers, except one that is itself an output of the model."""
    gone = []
    for node in graph.nodes("Constant"):
        value = constant_value(node)
        if value is not None and node.output[0] not in graph.outputs:
            graph.set_constant(node.output[0], value)
            gone.append(node)
    graph.remove(gone)


def drop_stored_inputs(graph: Graph) -> None:
    """Take initialisers off the list of inputs, where files before IR 4 repeat them."""
    keep = [value for value in graph.model.graph.input if value.name not in graph.constants]
    if len(keep) < len(graph.model.graph.input):
        del graph.model.graph.input[:]
        graph.model.graph.input.extend(keep)
        graph.refresh()


def drop_identities(graph: Graph) -> None:
    """Remove nodes that do nothing: Identity, Dropout at inference, Cast of a type to itself."""
    known = onnx.shape_inference.infer_shapes(graph.model).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*known.value_info, *known.input)}
    kinds |= {tensor.name: tensor.data_type for tensor in known.initializer}
    gone = []
    for node in graph.nodes("Identity", "Dropout", "Cast"):
        empty = node.op_type != "Cast" or kinds.get(node.input[0]) == attribute(node, "to")
        extra = [name for name in node.output[1:] if name in graph.readers or name in graph.outputs]
        if empty and not extra and node.output[0] not in graph.outputs:
            graph.redirect(node.output[0], node.input[0])
            gone.append(node)
    graph.remove(gone)


def name_nodes(graph: Graph) -> None:
    """Give every node without a name its operator and first output."""
    taken = Counter(node.name for node in graph.model.graph.node)
    for node in graph.model.graph.node:
        if not node.name:
            name = f"{node.op_type}_{node.output[0]}"
            node.name = name if not taken[name] else f"{name}_{taken[name]}"
            taken[name] += 1


def sort_nodes(model: ModelProto) -> None:
    """Put nodes into an order in which they can run, the present one where possible (Kahn, 1962)."""
    waiting = list(model.graph.node)
    known = {"", *(v.name for v in model.graph.input), *(t.name for t in model.graph.initializer)}
    done: list[NodeProto] = []
    while waiting:
        rest: list[NodeProto] = []
        for node in waiting:
            if known.issuperset(node.input):
                done.append(node)
                known.update(node.output)
            else:
                rest.append(node)
        if len(rest) == len(waiting):
            raise ValueError(f"the graph has a cycle at {rest[0].name}")
        waiting = rest
    copies = [_copy(node) for node in done]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _copy(node: NodeProto) -> NodeProto:
    copied = NodeProto()
    copied.CopyFrom(node)
    return copied


def to_float32(graph: Graph) -> bool:
    """Retype float16 and bfloat16 as float32, inputs and outputs included; returns whether anything changed."""
    half = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    changed = False
    for value in (*graph.model.graph.input, *graph.model.graph.output):
        if value.type.tensor_type.elem_type in half:
            value.type.tensor_type.elem_type, changed = TensorProto.FLOAT, True
    for tensor in list(graph.model.graph.initializer):
        if tensor.data_type in half:
            graph.set_constant(tensor.name, numpy_helper.to_array(tensor).astype(np.float32))
            changed = True
    for node in graph.model.graph.node:
        for item in node.attribute:
            if item.name in ("to", "output_dtype", "dtype") and item.i in half:
                item.i, changed = TensorProto.FLOAT, True
    del graph.model.graph.value_info[:]
    graph.refresh()
    return changed


def keep_opsets(model: ModelProto, domains: Iterable[str] = ("",)) -> None:
    """Drop imports of operator sets that no node uses, such as those that ONNX Runtime's tools leave behind."""
    keep = [entry for entry in model.opset_import if ("" if entry.domain == "ai.onnx" else entry.domain) in domains]
    copies = [helper.make_opsetid("", entry.version) for entry in keep]
    del model.opset_import[:]
    model.opset_import.extend(copies)
    for node in model.graph.node:
        node.domain = ""

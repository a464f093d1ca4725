"""Whether an ONNX graph is a graph: every tensor defined once and before it is read, of a size that can exist."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from operator import itemgetter

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from fmdeploy.errors import ModelFileError
from fmdeploy.onnxfile.header import shown

MAX_ELEMENTS = 2**31  # of one tensor: 8 GiB of float32, more than an Orin has for a model
CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")


def label(node: NodeProto) -> str:
    """What to call a node in a message: its name, or its first output where it has none."""
    return f"node {shown(node.name or next(iter(node.output), ''))} ({node.op_type[:40]})"


def check_structure(model: ModelProto) -> None:
    """Check names, order and stored tensors.

    Raises:
        ModelFileError: names the first node or tensor that is wrong.
    """
    graph = model.graph
    if graph.sparse_initializer:
        raise ModelFileError("holds sparse weights", where=f"tensor {shown(graph.sparse_initializer[0].values.name)}",
                             fix="Store them dense")
    if not graph.output:
        raise ModelFileError("has no outputs", fix="Export it again")
    for node in graph.node:
        _check_flat(node)
    for tensor in _stored(graph):
        _check_tensor(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.WhichOneof("value") != "tensor_type":
            raise ModelFileError("has an input or output that is no tensor", where=f"value {shown(value.name)}",
                                 found=value.type.WhichOneof("value"), fix="Export a network of tensors")
    _check_names(graph)
    _check_order(graph)


def check_sizes(model: ModelProto) -> None:
    """Check the declared and the inferred shape of every tensor.

    Raises:
        ModelFileError: a dimension is negative, or a tensor would not fit into any machine.
    """
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim if axis.HasField("dim_value")]
        if any(size < 0 for size in sizes) or math.prod(sizes) > MAX_ELEMENTS:
            raise ModelFileError("declares a size that cannot be", where=f"tensor {shown(value.name)}", found=sizes,
                                 expected=f"at most {MAX_ELEMENTS} elements", fix="Export it with the real shapes")


def _check_flat(node: NodeProto) -> None:
    inner = any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) or a.HasField("g") or a.graphs
                for a in node.attribute)
    if inner or node.op_type in CONTROL_FLOW:
        raise ModelFileError("holds control flow, whose time and memory nothing bounds", where=label(node),
                             fix="Export with the branch or the number of steps fixed")
    if any(a.HasField("sparse_tensor") or a.sparse_tensors for a in node.attribute):
        raise ModelFileError("holds a sparse tensor", where=label(node), fix="Store it dense")


def _stored(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for item in node.attribute:
            yield from [item.t] if item.HasField("t") else []
            yield from item.tensors


def _check_tensor(tensor: TensorProto) -> None:
    dims = list(tensor.dims)
    if any(size < 0 for size in dims) or math.prod(dims) > MAX_ELEMENTS:
        raise ModelFileError("declares a size that cannot be", where=f"tensor {shown(tensor.name)}", found=dims,
                             expected=f"at most {MAX_ELEMENTS} elements", fix="Export it again")
    try:
        numpy_helper.to_array(tensor)
    except Exception as error:  # ValueError, TypeError, KeyError, NotImplementedError: by what is wrong
        raise ModelFileError("does not hold the values that its shape and type announce",
                             where=f"tensor {shown(tensor.name)}", found=dims, fix="Export or copy it again"
                             ) from error


def _check_names(graph: GraphProto) -> None:
    """Check that a tensor is defined once: SSA form. An initialiser may stand among the inputs, as before IR 4."""
    made = [name for node in graph.node for name in node.output if name]
    for names in ([*(v.name for v in graph.input), *made], [*(t.name for t in graph.initializer), *made]):
        twice = next((name for name, count in Counter(names).items() if count > 1 or not name), None)
        if twice is not None:
            raise ModelFileError("defines a tensor twice, or one without a name", where=f"tensor {shown(twice)}",
                                 fix="Give every tensor its own name")
    outputs = [value.name for value in graph.output]
    if len(set(outputs)) < len(outputs):
        raise ModelFileError("names one tensor as output twice", found=[shown(name) for name in outputs][:4],
                             fix="Put an Identity between")
    named = Counter(node.name for node in graph.node if node.name)
    name, count = max(named.items(), key=itemgetter(1), default=("", 0))
    if count > 1:
        raise ModelFileError("has two nodes of one name", where=f"node {shown(name)}", fix="Name nodes uniquely")


def _check_order(graph: GraphProto) -> None:
    """Check that nodes stand in an order in which they can run, and say whether another order would do."""
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer} | {""}
    made = {name for node in graph.node for name in node.output}
    late: NodeProto | None = None
    for node in graph.node:
        for name in node.input:
            if name not in known and name not in made:
                raise ModelFileError(f"reads the tensor {shown(name)}, which nothing defines", where=label(node),
                                     fix="Export it again")
            late = late or (node if name not in known else None)
        known.update(node.output)
    for value in graph.output:
        if value.name not in known:
            raise ModelFileError("has an output that no node makes", where=f"tensor {shown(value.name)}",
                                 fix="Export it again")
    if late is not None:
        cycle = _on_cycle(graph)
        if cycle is not None:
            raise ModelFileError("has a cycle: this node waits for its own result", where=label(cycle),
                                 fix="Export it again")
        raise ModelFileError("reads a tensor before it is made", where=label(late),
                             fix="Sort the nodes: onnx_graphsurgeon's toposort, or export again")


def _on_cycle(graph: GraphProto) -> NodeProto | None:
    """A node that cannot run in any order (Kahn, 1962); None where all can."""
    waiting = {k: {n for n in node.input if n} for k, node in enumerate(graph.node)}
    made = {name for node in graph.node for name in node.output}
    readers: dict[str, list[int]] = {}
    for number, names in waiting.items():
        names &= made
        for name in names:
            readers.setdefault(name, []).append(number)
    ready = [number for number, names in waiting.items() if not names]
    for number in ready:  # grows while it is walked
        for name in graph.node[number].output:
            for reader in readers.get(name, ()):
                waiting[reader].discard(name)
                if not waiting[reader]:
                    ready.append(reader)
    stuck = set(waiting) - set(ready)
    return graph.node[min(stuck)] if stuck else None

"""From the placement to nodes of the exported graph: which ONNX nodes must run in INT8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnx import ModelProto, NodeProto

from fmdeploy.errors import GateError
from fmdeploy.export.fp16 import MOVES
from fmdeploy.onnxfile.graph import DQ, Graph, Q

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def placed_nodes(model: ModelProto, modules: Sequence[str]) -> tuple[str, ...]:
    """Names of the convolutions and matrix products of `modules`, found by their quantised weights.

    Args:
        model: the Q/DQ graph as exported: a module's weight is the initialiser MODULE.weight.
        modules: names of conv and linear modules that the placement quantises.

    Raises:
        GateError: a module has no quantised weight in the graph: its INT8 was lost on the way.
    """
    graph = Graph(model)
    names: dict[str, None] = {}
    for module in modules:
        found = [node.name for node in _readers(graph, f"{module}.weight", quantised=False)]
        if not found:
            raise GateError("is placed in INT8, but the exported graph has no quantised weight of it", where=module)
        names |= dict.fromkeys(found)
    return tuple(names)


def _readers(graph: Graph, tensor: str, *, quantised: bool) -> Iterator[NodeProto]:
    """Products that read `tensor` through a Q/DQ pair and operators that only move it."""
    for node in graph.readers[tensor]:
        if node.op_type in (Q, DQ, *MOVES):
            yield from _readers(graph, node.output[0], quantised=quantised or node.op_type == DQ)
        elif node.op_type in PRODUCTS and quantised:
            yield node

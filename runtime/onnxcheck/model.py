"""An ONNX file as typed, read-only objects: what the checks need, and nothing that would have to recurse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fmdeploy.errors import ModelFileError
from fmdeploy.runtime.onnxcheck import fields as known
from fmdeploy.runtime.onnxcheck.attributes import read_attribute
from fmdeploy.runtime.onnxcheck.tensors import Tensor, read_tensor, shown
from fmdeploy.runtime.onnxcheck.wire import REMEDY, Budget, Values, broken, read_message, signed, text


@dataclass(frozen=True)
class Node:
    """One operator."""

    op_type: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(repr=False)
    tensors: tuple[Tensor, ...]
    foreign: str
    """Why the node is not plain: an attribute that holds a graph, a sparse tensor, a type or a reference."""

    @property
    def where(self) -> str:
        """What to call it in a message."""
        return f"node {shown(self.name or next(iter(self.outputs), ''))} ({self.op_type[:40]})"


@dataclass(frozen=True)
class Value:
    """A declared tensor: input, output or in between. `dims` holds a number, a name, or None where nothing is said."""

    name: str
    is_tensor: bool
    elem_type: int
    dims: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Graph:
    """The one graph of a file."""

    name: str
    nodes: tuple[Node, ...]
    initializers: tuple[Tensor, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    values: tuple[Value, ...]
    has_sparse: bool


@dataclass(frozen=True)
class Model:
    """A whole file."""

    ir_version: int
    opsets: tuple[tuple[str, int], ...]
    graph: Graph
    num_functions: int
    num_training: int
    num_configurations: int

    @property
    def opset(self) -> int:
        """Version of ONNX's own operators; 0 where none is named."""
        return max((version for domain, version in self.opsets if domain in ("", "ai.onnx")), default=0)


def parse_model(raw: bytes) -> Model:
    """Read a file.

    Raises:
        ModelFileError: It is not an ONNX file, or not all of it.
    """
    budget = Budget()
    found = read_message(memoryview(raw), known.MODEL, budget)
    if "graph" not in found:
        raise broken("it holds no graph")
    opsets = [read_message(one, known.OPSET, budget) for one in found.get("opset_import", ())]
    return Model(
        ir_version=signed(found.get("ir_version", 0)),
        opsets=tuple((text(one.get("domain")), signed(one.get("version", 0))) for one in opsets),
        graph=_graph(found["graph"], budget), num_functions=len(found.get("functions", ())),
        num_training=len(found.get("training_info", ())), num_configurations=len(found.get("configuration", ())),
    )


def _graph(raw: memoryview, budget: Budget) -> Graph:
    found = read_message(raw, known.GRAPH, budget)
    return Graph(
        name=text(found.get("name")), nodes=tuple(_node(one, budget) for one in found.get("node", ())),
        initializers=tuple(read_tensor(one, budget) for one in found.get("initializer", ())),
        inputs=tuple(_declared(one, budget) for one in found.get("input", ())),
        outputs=tuple(_declared(one, budget) for one in found.get("output", ())),
        values=tuple(_declared(one, budget) for one in found.get("value_info", ())),
        has_sparse="sparse_initializer" in found,
    )


def _node(raw: memoryview, budget: Budget) -> Node:
    found = read_message(raw, known.NODE, budget)
    attributes: dict[str, Any] = {}
    tensors: list[Tensor] = []
    foreign = "a variant of a function" if found.get("overload") else ""
    for one in found.get("attribute", ()):
        name, value, held, odd = read_attribute(one, budget)
        if name in attributes:
            raise ModelFileError(f"gives the attribute {shown(name)} twice",
                                 where=f"node {shown(text(found.get('name')))}", fix=REMEDY)
        attributes[name] = value
        tensors += held
        foreign = foreign or odd
    return Node(
        op_type=text(found.get("op_type")), domain=text(found.get("domain")), name=text(found.get("name")),
        inputs=tuple(text(one) for one in found.get("input", ())),
        outputs=tuple(text(one) for one in found.get("output", ())),
        attributes=attributes, tensors=tuple(tensors), foreign=foreign,
    )


def _declared(raw: memoryview, budget: Budget) -> Value:
    found = read_message(raw, known.VALUE_INFO, budget)
    name = text(found.get("name"))
    kind = read_message(found["type"], known.TYPE, budget) if "type" in found else {}
    if "tensor_type" not in kind or len(kind.keys() - {"denotation"}) != 1:
        return Value(name, not kind, 0, None)
    tensor = read_message(kind["tensor_type"], known.TENSOR_TYPE, budget)
    dims: tuple[int | str | None, ...] | None = None
    if "shape" in tensor:
        shape = read_message(tensor["shape"], known.SHAPE, budget)
        dims = tuple(_dim(read_message(one, known.DIM, budget)) for one in shape.get("dim", ()))
    return Value(name, True, signed(tensor.get("elem_type", 0)), dims)


def _dim(found: Values) -> int | str | None:
    if "dim_value" in found and "dim_param" in found:
        raise broken("a size is a number and a name at once")
    if "dim_value" in found:
        return signed(found["dim_value"])
    return text(found["dim_param"]) if "dim_param" in found else None

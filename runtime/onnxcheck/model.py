"""An ONNX file as typed, read-only objects: what the checks need, and nothing that would have to recurse."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.errors import ModelFileError
from fmdeploy.runtime.onnxcheck import fields as known
from fmdeploy.runtime.onnxcheck.wire import (
    REMEDY,
    Budget,
    Values,
    broken,
    fixed_array,
    float32,
    integer_array,
    integers,
    read_message,
    signed,
    text,
)

MAX_ELEMENTS = 2**31  # of one tensor: 8 GiB of float32, more than an Orin has for a model
EXTERNAL = 1
FLOAT, INT32, INT64, STRING, FLOAT16, DOUBLE, BFLOAT16 = 1, 6, 7, 8, 10, 11, 16
# TensorProto.DataType of the plain types: numpy's type, and the field that holds values where raw_data does not.
DTYPES: dict[int, tuple[str, str]] = {
    FLOAT: ("<f4", "float_data"), 2: ("u1", "int32_data"), 3: ("i1", "int32_data"), 4: ("<u2", "int32_data"),
    5: ("<i2", "int32_data"), INT32: ("<i4", "int32_data"), INT64: ("<i8", "int64_data"), 9: ("?", "int32_data"),
    FLOAT16: ("<f2", "int32_data"), DOUBLE: ("<f8", "double_data"), 12: ("<u4", "uint64_data"),
    13: ("<u8", "uint64_data"),
}
TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def shown(name: str) -> str:
    """A name from a foreign file as it may stand in one line: quoted, control characters escaped, cut."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


@dataclass(frozen=True)
class Tensor:
    """Stored values: an initialiser, or an attribute of a node."""

    name: str
    dims: tuple[int, ...]
    data_type: int
    external: bool
    values: Values = field(repr=False)
    budget: Budget = field(repr=False)

    @property
    def where(self) -> str:
        """What to call it in a message."""
        return f"tensor {shown(self.name)}"

    @cached_property
    def array(self) -> Array:
        """Its values, without a copy where they are stored raw.

        Raises:
            ModelFileError: They do not fill the shape, or the type is not one that a bundle may hold.
        """
        count = self.num_elements
        dtype, typed = self._storage()
        held = [name for name in ("raw_data", *TYPED) if name in self.values]
        if len(held) > 1 or (held and held[0] not in ("raw_data", typed)):
            raise self._wrong("stores its values twice, or in a place of another type", expected=typed, found=held)
        array = self._raw(dtype) if held == ["raw_data"] else self._typed(dtype, typed)
        if array.size != count:
            raise self._wrong("does not hold the values that its shape announces", expected=count, found=array.size)
        return array.reshape(self.dims)

    @cached_property
    def num_elements(self) -> int:
        """Product of its sizes.

        Raises:
            ModelFileError: A size is negative, or they are too large together.
        """
        count = math.prod(self.dims)
        if len(self.dims) > 32 or any(size < 0 for size in self.dims) or max((count, *self.dims)) > MAX_ELEMENTS:
            raise self._wrong("declares a size that cannot be", expected=f"at most {MAX_ELEMENTS} elements",
                              found=list(self.dims[:8]))
        return count

    def _storage(self) -> tuple[str, str]:
        if self.data_type not in DTYPES:
            raise self._wrong("has a type that no bundle holds", found=f"data type {self.data_type}")
        return DTYPES[self.data_type]

    def _raw(self, dtype: str) -> Array:
        raw: memoryview = self.values["raw_data"]
        size = np.dtype(dtype).itemsize
        if len(raw) != self.num_elements * size:
            raise self._wrong("does not hold the bytes that its shape announces",
                              expected=self.num_elements * size, found=len(raw))
        return np.frombuffer(raw, dtype)

    def _typed(self, dtype: str, typed: str) -> Array:
        values = self.values.get(typed, [])
        if typed in ("float_data", "double_data"):
            return fixed_array(values, dtype)
        numbers = integer_array(values, self.budget)
        if self.data_type == FLOAT16:
            return numbers.astype(np.uint16).view(np.float16)
        return numbers.view(np.uint64).astype(dtype) if typed == "uint64_data" else numbers.astype(dtype)

    def _wrong(self, what: str, *, expected: object = None, found: object = None) -> ModelFileError:
        return ModelFileError(what, where=self.where, expected=expected, found=found, fix=REMEDY)


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
        initializers=tuple(_tensor(one, budget) for one in found.get("initializer", ())),
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
        item = read_message(one, known.ATTRIBUTE, budget)
        name = text(item.get("name"))
        if name in attributes:
            raise ModelFileError(f"gives the attribute {shown(name)} twice", where=f"node {text(found.get('name'))!r}",
                                 fix=REMEDY)
        attributes[name], held, odd = _attribute(item, budget)
        tensors += held
        foreign = foreign or odd
    return Node(
        op_type=text(found.get("op_type")), domain=text(found.get("domain")), name=text(found.get("name")),
        inputs=tuple(text(one) for one in found.get("input", ())),
        outputs=tuple(text(one) for one in found.get("output", ())),
        attributes=attributes, tensors=tuple(tensors), foreign=foreign,
    )


ODD = {"g": "a graph inside", "graphs": "a graph inside", "sparse_tensor": "a sparse tensor",
       "sparse_tensors": "a sparse tensor", "tp": "a type as value", "type_protos": "a type as value",
       "ref_attr_name": "a reference to an attribute"}


def _attribute(item: Values, budget: Budget) -> tuple[Any, list[Tensor], str]:
    """Value of an attribute, the tensors in it, and what is odd about it."""
    odd = next((why for name, why in ODD.items() if name in item), "")
    tensors = [_tensor(one, budget) for one in ([item["t"]] if "t" in item else []) + item.get("tensors", [])]
    held: dict[str, Any] = {name: item[name] for name in ("f", "i", "s", "floats", "ints", "strings") if name in item}
    if "t" in item or "tensors" in item:
        held["t"] = tensors[0] if "t" in item else tensors
    if len(held) > 1:
        raise broken("an attribute has two values")
    return (_plain(*next(iter(held.items())), budget) if held else None), tensors, odd


def _plain(name: str, value: Any, budget: Budget) -> Any:
    if name == "f":
        return float32(value)
    if name == "i":
        return signed(value)
    if name == "floats":
        return fixed_array(value, "<f4").tolist()
    if name == "ints":
        return integers(value, budget)
    if name == "s":
        return bytes(value)
    return [bytes(one) for one in value] if name == "strings" else value


def _tensor(raw: memoryview, budget: Budget) -> Tensor:
    found = read_message(raw, known.TENSOR, budget)
    external = bool(found.get("data_location", 0)) or "external_data" in found or "segment" in found
    return Tensor(name=text(found.get("name")), dims=tuple(integers(found.get("dims", []), budget)),
                  data_type=signed(found.get("data_type", 0)), external=external, values=found, budget=budget)


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

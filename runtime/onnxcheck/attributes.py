"""Attributes of nodes: the one value that the stated type names, and no other.

ONNX Runtime reads the field that the type says and passes over the rest, so a file that fills another field, or two,
could show one number here and compute with another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fmdeploy.runtime.onnxcheck import fields as known
from fmdeploy.runtime.onnxcheck.tensors import Tensor, read_tensor
from fmdeploy.runtime.onnxcheck.wire import (
    Budget,
    Values,
    broken,
    fixed_array,
    float32,
    integers,
    read_message,
    signed,
    text,
)

# AttributeProto.AttributeType of the plain types, and the field that holds such a value.
PLAIN = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints", 8: "strings", 9: "tensors"}
DEFAULTS: dict[str, Any] = {"f": 0.0, "i": 0, "s": b""}
ODD = {"g": "a graph inside", "graphs": "a graph inside", "sparse_tensor": "a sparse tensor",
       "sparse_tensors": "a sparse tensor", "tp": "a type as value", "type_protos": "a type as value",
       "ref_attr_name": "a reference to an attribute"}


class Attribute(NamedTuple):
    """One attribute: its name, its value, the tensors in it, and what is odd about it."""

    name: str
    value: Any
    tensors: tuple[Tensor, ...] = ()
    foreign: str = ""


def read_attribute(raw: memoryview, budget: Budget) -> Attribute:
    """Read one attribute.

    Raises:
        ModelFileError: It holds another value than its type says, or several.
    """
    found = read_message(raw, known.ATTRIBUTE, budget)
    name = text(found.get("name"))
    if odd := next((why for field, why in ODD.items() if field in found), ""):
        return Attribute(name, None, foreign=odd)
    field = PLAIN.get(kind := signed(found.get("type", 0)))
    if field is None:
        return Attribute(name, None, foreign=f"a value of the unknown type {kind}")
    if [one for one in PLAIN.values() if one in found] not in ([], [field]):
        raise broken(f"the attribute {name[:40]!r} holds another value than its type says")
    if field in ("t", "tensors"):
        tensors = tuple(read_tensor(one, budget) for one in _listed(found.get(field, [])))
        if field == "t" and not tensors:
            raise broken(f"the attribute {name[:40]!r} holds no tensor")
        return Attribute(name, tensors[0] if field == "t" else list(tensors), tensors)
    return Attribute(name, _plain(field, found, budget))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plain(field: str, found: Values, budget: Budget) -> Any:
    if field not in found:
        return DEFAULTS.get(field, [])
    value = found[field]
    if field == "f":
        return float32(value)
    if field == "i":
        return signed(value)
    if field == "floats":
        return fixed_array(value, "<f4").tolist()
    if field == "ints":
        return integers(value, budget)
    return [bytes(one) for one in value] if field == "strings" else bytes(value)

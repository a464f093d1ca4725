"""Stored values of an ONNX file: where they lie, how many there must be, and what numpy calls them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.errors import ModelFileError
from fmdeploy.runtime.onnxcheck import fields as known
from fmdeploy.runtime.onnxcheck.wire import (
    REMEDY,
    Budget,
    Values,
    fixed_array,
    integer_array,
    integers,
    read_message,
    signed,
    text,
)

MAX_ELEMENTS = 2**31  # of one tensor: 8 GiB of float32, more than an Orin has for a model
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
        if typed == "int32_data":
            numbers = numbers.astype(np.int32)  # as protobuf cuts them, before a bool or a byte is made of them
        if self.data_type == FLOAT16:
            return numbers.astype(np.uint16).view(np.float16)
        return numbers.view(np.uint64).astype(dtype) if typed == "uint64_data" else numbers.astype(dtype)

    def _wrong(self, what: str, *, expected: object = None, found: object = None) -> ModelFileError:
        return ModelFileError(what, where=self.where, expected=expected, found=found, fix=REMEDY)


def read_tensor(raw: memoryview, budget: Budget) -> Tensor:
    """Read one stored tensor; its values are looked at when they are asked for."""
    found = read_message(raw, known.TENSOR, budget)
    external = bool(found.get("data_location", 0)) or "external_data" in found or "segment" in found
    return Tensor(name=text(found.get("name")), dims=tuple(integers(found.get("dims", []), budget)),
                  data_type=signed(found.get("data_type", 0)), external=external, values=found, budget=budget)

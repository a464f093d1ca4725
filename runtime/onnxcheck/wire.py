"""A bounded reader of protobuf's wire format: one message at a time, never deeper than it is asked to go.

Nothing here recurses: a nested message comes back as bytes, and the caller decides whether to read it. What protobuf
allows and no writer does (a singular field twice, unknown fields, groups) is refused, since two readers of the same
bytes may disagree about what it means.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.errors import ModelFileError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_VARINT_BYTES = 10
# Of one file, all messages together; a message counts as much as eight fields, which is what it costs. A transformer of
# 24 layers needs 100,000; the largest file that passes is read in about a second.
MAX_FIELDS = 400_000
A_MESSAGE = 8
REMEDY = "Export or copy it again"


class Field(NamedTuple):
    """One field of a message: its name, the wire type of one value, and whether it repeats."""

    name: str
    wire: int
    repeated: bool = False


Fields = Mapping[int, Field]
Values = dict[str, Any]


class Budget:
    """How many fields may still be read: bounds time and memory of a whole file."""

    def __init__(self, fields: int = MAX_FIELDS) -> None:
        self.left = fields

    def spend(self, count: int = 1) -> None:
        """Take from the budget.

        Raises:
            ModelFileError: It is empty.
        """
        self.left -= count
        if self.left < 0:
            raise ModelFileError("holds more parts than a network has", expected=f"at most {MAX_FIELDS}",
                                 fix="Simplify it, or export a smaller one")


def broken(why: str) -> ModelFileError:
    """The error for bytes that are no ONNX file."""
    return ModelFileError(f"is not an ONNX model, or not all of it: {why}", fix=REMEDY)


def varint(raw: memoryview, at: int) -> tuple[int, int]:
    """The unsigned number at `at`, and the place behind it.

    Raises:
        ModelFileError: It does not end, or is longer than 64 bits.
    """
    value = shift = 0
    end = min(len(raw), at + MAX_VARINT_BYTES)
    while at < end:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 1 << 64:
                raise broken("a number is longer than 64 bits")
            return value, at
        shift += 7
    raise broken("a number does not end")


def signed(value: int) -> int:
    """A 64-bit two's complement number as protobuf's int64 and int32."""
    return value - (1 << 64) if value >= 1 << 63 else value


def read_message(raw: memoryview, fields: Fields, budget: Budget) -> Values:
    """Split one message into its fields.

    Args:
        raw: The message's bytes.
        fields: What it may hold, by field number.
        budget: Shared by all messages of a file.

    Returns:
        Name to value, with a list for a field that repeats: int for numbers, memoryview for nested messages, texts,
        fixed-width numbers and packed lists. A field that is not there is not a key.

    Raises:
        ModelFileError: The bytes are cut, or no message of this kind.
    """
    budget.spend(A_MESSAGE)
    found: Values = {}
    at, end, before = 0, len(raw), budget.left
    while at < end:
        tag = raw[at]
        at += 1
        if tag >= 0x80:
            tag, at = varint(raw, at - 1)
        before -= 1
        if before < 0:
            budget.spend(budget.left + 1)
        field = fields.get(tag >> 3)
        if field is None:
            raise broken(f"it holds the unknown field {tag >> 3}")
        value, at = _value(raw, at, tag & 7)
        if (tag & 7) != field.wire and not (field.repeated and tag & 7 == BYTES):
            raise broken(f"the field {field.name} has another type")
        if field.repeated:
            found.setdefault(field.name, []).append(value)
        elif field.name in found:
            raise broken(f"the field {field.name} is there twice")
        else:
            found[field.name] = value
    budget.left = before
    return found


def _value(raw: memoryview, at: int, wire: int) -> tuple[Any, int]:
    if wire == BYTES:
        size, at = varint(raw, at)
        stop = at + size
    elif wire == VARINT:
        return varint(raw, at)
    elif wire == FIXED32:
        stop = at + 4
    elif wire == FIXED64:
        stop = at + 8
    else:
        raise broken(f"it holds the wire type {wire}")
    if stop > len(raw):
        raise broken("it is cut short")
    return raw[at:stop], stop


def text(raw: memoryview | None) -> str:
    """A name.

    Raises:
        ModelFileError: It is not UTF-8.
    """
    if raw is None:
        return ""
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError("holds a name that is not text", found=bytes(raw[:20]), fix=REMEDY) from error


def float32(raw: memoryview) -> float:
    """One fixed-width float."""
    return float(struct.unpack("<f", raw)[0])


def integers(values: list[Any], budget: Budget) -> list[int]:
    """A repeated number, packed or not, as signed 64-bit numbers."""
    if all(isinstance(value, int) for value in values):
        return [signed(value) for value in values]
    return [int(number) for number in integer_array(values, budget)]


def integer_array(values: list[Any], budget: Budget) -> Array:
    """The same as int64 array, fast for long packed lists."""
    parts: list[Array] = []
    for value in values:
        parts.append(np.array([signed(value)], np.int64) if isinstance(value, int) else _packed(value))
        budget.spend(max(1, len(parts[-1]) // 256))
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _packed(raw: memoryview) -> Array:
    """A packed list of variable-length numbers, decoded all at once."""
    octets = np.frombuffer(raw, np.uint8)
    if octets.size == 0:
        return np.empty(0, np.int64)
    last = np.flatnonzero(octets < 0x80)
    if last.size == 0 or last[-1] != octets.size - 1:
        raise broken("a number does not end")
    first = np.concatenate(([0], last[:-1] + 1))
    lengths = last - first + 1
    if lengths.max() > MAX_VARINT_BYTES:
        raise broken("a number is longer than 64 bits")
    place = np.arange(octets.size) - np.repeat(first, lengths)
    pieces = (octets & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    result: Array = np.bitwise_or.reduceat(pieces, first).view(np.int64)
    return result


def fixed_array(values: list[memoryview], dtype: str) -> Array:
    """A repeated fixed-width number, packed or not.

    Raises:
        ModelFileError: The bytes are no whole number of them.
    """
    size = np.dtype(dtype).itemsize
    if any(len(value) % size for value in values):
        raise broken("a list of numbers is cut short")
    return np.frombuffer(b"".join(values) if len(values) != 1 else values[0], dtype)

"""Fields of messages, whether these are dictionaries (JSON) or objects (ROS 2, protobuf)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from fmdeploy.errors import DataError


def member(value: Any, name: str) -> Any:
    """What `value` holds under a name, or a list under a number; None where there is nothing."""
    if isinstance(value, Mapping):
        return value.get(name)
    if isinstance(value, Sequence) and name.isdecimal():
        return value[int(name)] if int(name) < len(value) else None
    return getattr(value, name, None)


def has(value: Any, *names: str) -> bool:
    """Whether a message has all these fields: what it is shows in them, since packages rename and copy messages."""
    return all(member(value, name) is not None for name in names)


def names_of(value: Any) -> str:
    """The fields of a message, or its type, for messages to people."""
    if isinstance(value, Mapping):
        return ", ".join(map(str, value))
    described = getattr(getattr(value, "DESCRIPTOR", None), "fields", None)
    names = [field.name for field in described] if described else getattr(value, "__slots__", ())
    return ", ".join(names) or type(value).__name__


def whole(value: Any, name: str, where: str) -> int:
    """A field that is a number from 0, of 32 bits as all sizes are.

    Raises:
        DataError: it is something else.
    """
    found = member(value, name)
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < 2**32:
        raise DataError(f"the field {name!r} is no whole number of 32 bits", where=where, found=repr(found)[:40])
    return found


def bytes_of(value: Any, where: str) -> bytes:
    """Bytes, also from text in base64 or from a list of numbers, as JSON has them.

    Raises:
        DataError: it is something else.
    """
    try:
        if isinstance(value, str):
            return base64.b64decode(value, validate=True)
        if isinstance(value, (bytes, bytearray, memoryview, list)):
            return bytes(value)
    except binascii.Error as error:
        raise DataError("a field is text, neither number, list nor image in base64", where=where,
                        found=repr(value)[:40]) from error
    except (ValueError, TypeError) as error:  # a list of something else
        raise DataError(f"a field holds no bytes: {error}", where=where, found=repr(value)[:40]) from error
    raise DataError("a field holds no bytes", where=where, found=repr(value)[:40])

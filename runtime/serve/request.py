"""Bytes of an infer request → one frame. KServe v2 JSON, and its binary tensor data extension.

    {"id": "…", "inputs": [{"name", "shape": [1, …], "datatype", "data": […]}], "outputs": […], "parameters": {…}}

In binary, the JSON is as long as the header Inference-Header-Content-Length says, an input has the parameter
`binary_data_size` instead of `data`, and the raw little-endian bytes follow in the order of the inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic_core import from_json

from fmdeploy import strictjson
from fmdeploy.arrays import Array, Arrays
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.runtime.serve.errors import RequestError

DATATYPE = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8", "int64": "INT64"}
HEADER_LIMIT = 64 * 1024
PARAMETERS = ("stamp_ns", "deadline_ms", "timeout", "layouts", "missing", "allow_invalid", "binary_data_output")


@dataclass(frozen=True)
class InferRequest:
    """One frame that a client sent.

    Attributes:
        id: What the client calls it; comes back in the answer.
        inputs: Input name to array without batch axis; views of the body where that is possible.
        outputs: Names of the wanted outputs in order, each with whether it is wanted in binary; empty: all.
        binary: Whether outputs go in binary where nothing else is said.
        stamp_ns, deadline_ms, layouts, missing: As in `Runtime.infer`.
        allow_invalid: Answer an invalid frame with its record instead of an error.
    """

    id: str
    inputs: Arrays
    outputs: tuple[tuple[str, bool], ...]
    binary: bool
    stamp_ns: int | None = None
    deadline_ms: float | None = None
    layouts: Mapping[str, str] | None = None
    missing: tuple[str, ...] = ()
    allow_invalid: bool = False


def is_short(headers: Mapping[bytes, bytes]) -> bool:
    """Whether the JSON is short, because raw tensors follow it: then parsing is cheap."""
    length = headers.get(b"inference-header-content-length", b"")
    return length.isdigit() and len(length) <= len(str(HEADER_LIMIT)) and int(length) <= HEADER_LIMIT


def parse_infer(io: IOSpec, headers: Mapping[bytes, bytes], body: bytes | bytearray) -> InferRequest:
    """Read one infer request.

    Raises:
        RequestError: It is not what the protocol and io.json say; the text says what.
    """
    size = _header_size(headers, len(body))
    root = _json_object(body[:size] if size != len(body) else body)
    _only(root, ("id", "inputs", "outputs", "parameters", "model_name", "model_version"), "the request")
    options = _object(root.get("parameters", {}), "parameters")
    _only(options, PARAMETERS, "parameters", noun="parameter")
    name = root.get("id", "")
    if not isinstance(name, str) or len(name) > 256:
        raise RequestError(400, "id is not a string of at most 256 characters")
    binary = _flag(options, "binary_data_output")
    inputs = _inputs(io, root.get("inputs"), memoryview(body)[size:])
    return InferRequest(
        name, inputs, _outputs(io, root.get("outputs", []), binary), binary,
        _stamp(options), _deadline(options), _layouts(options), _missing(options), _flag(options, "allow_invalid"),
    )


def _header_size(headers: Mapping[bytes, bytes], length: int) -> int:
    text = headers.get(b"inference-header-content-length")
    if text is None:
        return length
    if not text.isdigit() or len(text) > 9 or not 0 < int(text) <= length:
        raise RequestError(400, f"Inference-Header-Content-Length must be 1 to {length}, the size of the body, "
                                f"found {text.decode('latin-1')[:32]!r}")
    if int(text) > HEADER_LIMIT and int(text) != length:
        raise RequestError(400, f"the JSON before binary data is larger than {HEADER_LIMIT} bytes")
    return int(text)


def _json_object(raw: bytes | bytearray) -> dict[str, Any]:
    """Read one object: no NaN, bounded depth, no key twice.

    The fast parser lets the last of two equal keys count. Each pair has a colon, so where there are as many colons as
    keys no key came twice; only a text with more of them, in strings, is read again by the strict parser.
    """
    try:
        root = from_json(raw, allow_inf_nan=False)
        if raw.count(b":") != _count_keys(root):
            strictjson.loads(bytes(raw))
    except ValueError as error:
        raise RequestError(400, f"the request is not JSON: {str(error)[:200]}") from error
    return _object(root, "the request")


def _count_keys(value: Any) -> int:
    """Keys of all objects, but for those in lists that begin with something else: no valid request has any there."""
    if isinstance(value, dict):
        return len(value) + sum(map(_count_keys, value.values()))
    return sum(map(_count_keys, value)) if isinstance(value, list) and value and isinstance(value[0], dict) else 0


def _inputs(io: IOSpec, listed: Any, raw: memoryview) -> Arrays:
    if not isinstance(listed, list) or not listed or len(listed) > len(io.inputs):
        raise RequestError(400, f"inputs must be a list of 1 to {len(io.inputs)} tensors")
    specs = {spec.name: spec for spec in io.inputs}
    inputs: Arrays = {}
    at = 0
    for item in listed:
        tensor = _object(item, "an input")
        name = tensor.get("name")
        spec = specs.pop(name, None) if isinstance(name, str) else None
        if spec is None:
            raise RequestError(400, f"input {str(name)[:64]!r} is unknown or comes twice; "
                                    f"the model has {[known.name for known in io.inputs]}")
        array, used = _tensor(spec, tensor, raw[at:])
        inputs[spec.name], at = array, at + used
    if at != len(raw):
        raise RequestError(400, f"{len(raw) - at} bytes of binary data belong to no input")
    return inputs


def _tensor(spec: TensorSpec, tensor: dict[str, Any], raw: memoryview) -> tuple[Array, int]:
    """Return the array, and how many bytes of `raw` it is."""
    _only(tensor, ("name", "shape", "datatype", "data", "parameters"), f"input {spec.name!r}")
    if tensor.get("datatype") != DATATYPE[spec.dtype]:
        raise RequestError(400, f"input {spec.name!r} must have datatype {DATATYPE[spec.dtype]}, nothing is cast; "
                                f"found {str(tensor.get('datatype'))[:32]!r}")
    wanted = [1, *spec.shape]
    shape = tensor.get("shape")
    if shape != wanted or any(type(size) is not int for size in shape):
        raise RequestError(400, f"input {spec.name!r} must have shape {wanted}, found {str(shape)[:64]}")
    options = _object(tensor.get("parameters", {}), f"parameters of input {spec.name!r}")
    _only(options, ("binary_data_size",), f"input {spec.name!r}", noun="parameter")
    if "binary_data_size" not in options:
        return _json_tensor(spec, tensor), 0
    if "data" in tensor:
        raise RequestError(400, f"input {spec.name!r} has both data and binary_data_size")
    dtype = np.dtype(spec.dtype)
    size, need = options["binary_data_size"], math.prod(spec.shape) * dtype.itemsize
    if type(size) is not int or size != need or len(raw) < need:
        raise RequestError(400, f"input {spec.name!r} needs {need} bytes of binary data, binary_data_size says "
                                f"{str(size)[:32]}, {len(raw)} bytes are left in the body")
    return np.frombuffer(raw[:need], dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(spec.shape), need


def _json_tensor(spec: TensorSpec, tensor: dict[str, Any]) -> Array:
    """Flat or nested numbers. JSON has no NaN and one kind of number; strings and booleans are none."""
    dtype, size, data = np.dtype(spec.dtype), math.prod(spec.shape), tensor.get("data")
    found = np.empty(0, object)
    # First: among numbers numpy takes True for 1, and beside one long string it would make every number as long.
    if _are_numbers(data, len(spec.shape) + 1, size):
        with suppress(ValueError):  # ragged
            found = np.asarray(data)
    kinds, limits = "if" if dtype.kind == "f" else "i", None if dtype.kind == "f" else np.iinfo(dtype)
    if found.dtype.kind not in kinds or found.shape not in ((size,), spec.shape, (1, *spec.shape)):
        raise RequestError(400, f"data of input {spec.name!r} must be {size} numbers, "
                                f"flat or nested as {[1, *spec.shape]}")
    if limits is not None and not limits.min <= found.min() <= found.max() <= limits.max:
        raise RequestError(400, f"data of input {spec.name!r} does not fit {DATATYPE[spec.dtype]}")
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, and the guards refuse that
        return found.astype(dtype).reshape(spec.shape)


def _are_numbers(data: Any, depth: int, size: int) -> bool:
    """Whether these are `size` numbers in lists, nested at most `depth` deep."""
    items: Iterable[Any] = data if isinstance(data, list) else []
    for _ in range(depth):
        items = list(itertools.islice(items, size + 1))
        if not (items and isinstance(items[0], list)):
            break
        if not all(isinstance(item, list) for item in items):
            return False
        items = itertools.chain.from_iterable(items)
    items = list(itertools.islice(items, size + 1))
    return len(items) == size and set(map(type, items)) <= {int, float}


def _outputs(io: IOSpec, listed: Any, binary: bool) -> tuple[tuple[str, bool], ...]:
    if not isinstance(listed, list) or len(listed) > len(io.outputs):
        raise RequestError(400, f"outputs must be a list of at most {len(io.outputs)} tensors")
    names = {spec.name for spec in io.outputs}
    found: dict[str, bool] = {}
    for item in listed:
        output = _object(item, "an output")
        name = output.get("name")
        if not isinstance(name, str) or name not in names or name in found:
            raise RequestError(400, f"output {str(name)[:64]!r} is unknown or comes twice; "
                                    f"the model has {sorted(names)}")
        options = _object(output.get("parameters", {}), f"parameters of output {name!r}")
        _only(options, ("binary_data",), f"output {name!r}", noun="parameter")
        found[name] = _flag(options, "binary_data", default=binary)
    return tuple(found.items())


def _stamp(options: dict[str, Any]) -> int | None:
    stamp = options.get("stamp_ns")
    if stamp is not None and (type(stamp) is not int or not 0 <= stamp < 2**63):
        raise RequestError(400, "parameter stamp_ns must be nanoseconds on the machine's monotonic clock, an integer")
    return stamp


def _deadline(options: dict[str, Any]) -> float | None:
    """`deadline_ms`, or Triton's `timeout` in microseconds."""
    deadline = options.get("deadline_ms")
    if deadline is None and "timeout" in options:
        timeout = options["timeout"]
        if type(timeout) is not int or timeout < 0:
            raise RequestError(400, "parameter timeout must be microseconds, an integer")
        return timeout / 1000 or None  # Triton: 0 means none
    if deadline is None:
        return None
    if type(deadline) not in (int, float) or not 0 < deadline < 1e9:
        raise RequestError(400, "parameter deadline_ms must be a positive number of milliseconds")
    return float(deadline)


def _layouts(options: dict[str, Any]) -> dict[str, str] | None:
    """An object, or `lidar=CHW,camera=CHW`."""
    layouts = options.get("layouts")
    if isinstance(layouts, str):
        layouts = dict(pair.partition("=")[::2] for pair in layouts.split(",") if pair)
    if layouts is not None and not (isinstance(layouts, dict) and all(isinstance(v, str) for v in layouts.values())):
        raise RequestError(400, "parameter layouts must be like 'lidar=CHW,camera=CHW'")
    return layouts or None


def _missing(options: dict[str, Any]) -> tuple[str, ...]:
    """A list, or `lidar,camera`."""
    missing = options.get("missing", ())
    if isinstance(missing, str):
        missing = [name for name in missing.split(",") if name]
    if not isinstance(missing, (list, tuple)) or not all(isinstance(name, str) for name in missing):
        raise RequestError(400, "parameter missing must be names of inputs, like 'lidar,camera'")
    return tuple(missing)


def _flag(options: dict[str, Any], name: str, *, default: bool = False) -> bool:
    value = options.get(name, default)
    if type(value) is not bool:
        raise RequestError(400, f"parameter {name} must be true or false")
    return value


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(400, f"{what} is not a JSON object")
    return value


def _only(found: dict[str, Any], known: tuple[str, ...], where: str, *, noun: str = "key") -> None:
    """Refuse what nobody reads: a misspelt stamp that is ignored would be a frame without one."""
    for name in found:
        if name not in known:
            raise RequestError(400, f"{where}: unknown {noun} {name[:64]!r}; known are {', '.join(known)}")

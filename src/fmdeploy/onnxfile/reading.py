"""Read an ONNX file that somebody else made: what comes back is safe to edit, to run and to compile.

ONNX Runtime and TensorRT read hostile files in ways that crash, hang or leave the model's folder (ONNX Runtime 1.23
dies of `*/_ORT_MEM_ADDR_/*` and follows `..`; any of them waits for ever on a FIFO; a scale of 0 or NaN runs without a
word). So every file passes here first, and each refusal is one line that names the node or the tensor and the remedy:

    bytes       a regular file of a sane size, read through one descriptor              this module
    header      IR and opset that exist, ONNX's own operators, no functions, no training       header.py
    weights     outside data only from plain files in the model's own folder, embedded     external.py
    graph       every tensor defined once and before its readers, no control flow, sane sizes    structure.py
    numbers     scales that are positive and normal, zero points and axes that fit           grids.py
    the rest    onnx.checker with strict shape inference
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import Message
from onnx import ModelProto

from fmdeploy.errors import ModelFileError
from fmdeploy.likely import cause_of
from fmdeploy.onnxfile.external import embed_external_data
from fmdeploy.onnxfile.grids import check_grids
from fmdeploy.onnxfile.header import check_header
from fmdeploy.onnxfile.plainfile import plain_file
from fmdeploy.onnxfile.structure import check_sizes, check_structure

MAX_BYTES = 2**31 - 1  # protobuf's own limit on one message


def read_model(path: Path) -> ModelProto:
    """Read and check an ONNX model; external weights of its own folder come back embedded.

    Raises:
        ModelFileError: the file cannot be used; one line that names the node or tensor and what to do.
    """
    try:
        return _checked(_parse(read_bytes(path)), path)
    except ModelFileError as error:
        place = str(path) if error.where is None else f"{path}, {error.where}"
        raise ModelFileError(error.what, where=place, expected=error.expected, found=error.found,
                             fix=error.fix) from error


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes; anything else, such as a FIFO, is refused without waiting on it.

    Raises:
        ModelFileError: it is missing, no regular file, empty or too big.
    """
    try:
        with plain_file(path) as (file, status):
            if status.st_size == 0:
                raise ModelFileError("is empty", fix="Write it again: the export did not finish")
            if status.st_size > limit:
                raise ModelFileError("is too big", expected=f"at most {limit} bytes", found=status.st_size,
                                     fix="Keep the weights in a file beside the model")
            return file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        missing = isinstance(error, FileNotFoundError)
        raise ModelFileError("no such model file" if missing else f"cannot be opened: {error}",
                             fix="Check the path and its permissions") from error


def _parse(content: bytes) -> ModelProto:
    model = ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError has no public base class
        raise ModelFileError(f"is not an ONNX model, or not all of it: {cause_of(content[:512]) or _first_line(error)}",
                             fix="Export or copy it again") from error
    broken = next((text for text in _texts(model) if not isinstance(text, str)), None)
    if broken is not None:
        raise ModelFileError("holds a name that is not text", found=broken[:20], fix="Export or copy it again")
    return model


def _texts(message: Message) -> Iterator[str | bytes]:
    """Every string of a protobuf message; protobuf gives those that are not UTF-8 as bytes."""
    for field, value in message.ListFields():
        single = isinstance(value, (str, bytes, Message))
        if field.type == field.TYPE_STRING:
            yield from [value] if single else value
        elif field.type == field.TYPE_MESSAGE:
            for child in [value] if single else value:
                yield from _texts(child)


def _checked(model: ModelProto, path: Path) -> ModelProto:
    check_header(model)
    embed_external_data(model, path.parent, MAX_BYTES)
    check_structure(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        for value, found in zip(model.graph.output, inferred.graph.output, strict=True):
            if not value.type.tensor_type.HasField("shape"):  # some writers leave it out
                value.CopyFrom(found)
        onnx.checker.check_model(model)
    except Exception as error:  # ValidationError, InferenceError, and what C++ throws through pybind
        raise ModelFileError(f"is not valid ONNX: {_first_line(error)}") from error
    check_sizes(inferred)
    check_grids(inferred)
    return model


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__

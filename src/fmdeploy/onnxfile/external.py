"""Weights in other files: taken from plain files inside the model's own folder, and embedded; anything else is refused.

After this, no runtime sees a path: ONNX Runtime 1.23 would follow `..`, absolute paths and symlinks, and dies of the
marker `*/_ORT_MEM_ADDR_/*`. The rules are those of onnx >= 1.21: no way out of the folder, no link of either kind.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from google.protobuf.message import Message
from onnx import ModelProto, TensorProto

from fmdeploy.errors import ModelFileError
from fmdeploy.onnxfile.header import shown
from fmdeploy.onnxfile.plainfile import plain_file

EMBED = "Save the model as a single file: onnx.save(onnx.load(path), new_path)"


def embed_external_data(model: ModelProto, folder: Path, limit: int) -> None:
    """Move external weights into the model.

    Args:
        model: Changed in place.
        folder: The model's own; nothing outside it is opened.
        limit: Largest number of bytes of all weights together.

    Raises:
        ModelFileError: a location leaves the folder or is a link, or its file is too short.
    """
    total = 0
    for tensor in _tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            if tensor.external_data:
                raise ModelFileError("names a weights file, and says that it does not", where=_where(tensor), fix=EMBED)
            continue
        values = _read(tensor, folder, limit - total)
        total += len(values)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = values


def _tensors(message: Message) -> Iterator[TensorProto]:
    """Every tensor of a protobuf message, also those in attributes."""
    if isinstance(message, TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for child in [value] if isinstance(value, Message) else value:
                yield from _tensors(child)


def _where(tensor: TensorProto) -> str:
    return f"tensor {shown(tensor.name)}"


def _read(tensor: TensorProto, folder: Path, limit: int) -> bytes:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    path = _inside(location, folder, tensor)
    offset, length = _number(entries, "offset", tensor), _number(entries, "length", tensor)
    try:
        with plain_file(path, follow=False) as (file, status):
            return _slice(file, status, offset or 0, length, limit)
    except OSError as error:
        reason = f"which cannot be opened: {error.strerror}"
        raise ModelFileError(f"keeps its weights in {shown(location)}, {reason}", where=_where(tensor),
                             fix="Copy that file beside the model, or save it as one file") from error
    except ModelFileError as error:
        raise ModelFileError(f"keeps its weights in {shown(location)}, which {error.what}", where=_where(tensor),
                             expected=error.expected, found=error.found, fix=error.fix) from error


def _slice(file: BinaryIO, status: os.stat_result, offset: int, length: int | None, limit: int) -> bytes:
    if status.st_nlink != 1:
        raise ModelFileError("is a hard link, which may belong to somebody else", fix=EMBED)
    wanted = status.st_size - offset if length is None else length
    if offset + wanted > status.st_size or wanted < 0:
        raise ModelFileError("is too short", expected=f"{offset + max(wanted, 0)} bytes", found=status.st_size,
                             fix="Copy that file again")
    if wanted > limit:
        raise ModelFileError("is more than one file can hold", expected="at most 2 GiB", fix="Split the model")
    file.seek(offset)
    return file.read(wanted)


def _inside(location: str, folder: Path, tensor: TensorProto) -> Path:
    """The file of a relative `location` without `..` and without any link below `folder`."""
    parts = PurePosixPath(location).parts
    if not parts or location.startswith("/") or ".." in parts or "\\" in location or ":" in location or (
        "_ORT_MEM_ADDR_" in location or "\0" in location
    ):
        raise ModelFileError(f"keeps its weights outside its folder: {shown(location)}", where=_where(tensor),
                             fix=EMBED)
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise ModelFileError(f"keeps its weights behind a symbolic link: {shown(location)}", where=_where(tensor),
                                 fix=EMBED)
    return path


def _number(entries: dict[str, str], key: str, tensor: TensorProto) -> int | None:
    text = entries.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ModelFileError(f"gives its weights file an {key} that is no number", where=_where(tensor),
                             found=shown(text), fix=EMBED)
    return int(text)

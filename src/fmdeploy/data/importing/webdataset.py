"""WebDataset shards: tar files in which files of one stem are one sample (read by the `webdataset` package).

    .cls .txt (a number)      label, int64
    .jpg .png ...             image, float32 (C, H, W)
    .npy                      an array called like the extension before it: `7.lidar.npy` is `lidar`
    .npz                      its arrays by name
    .json                     `sequence`, `split`, and metadata: what all samples of a sequence say alike

Nothing is unpickled.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.data.format import SPLITS, bound_unpacked
from fmdeploy.data.importing.drives import Drive, read_json, reason_of, safe_id
from fmdeploy.data.importing.pictures import SUFFIXES, decode_image
from fmdeploy.errors import DataError
from fmdeploy.optional import require

Sample = dict[str, Any]


def shards_of(source: Path) -> list[Path]:
    """The tar files of `source`, which is one or a folder of them.

    Raises:
        DataError: there is none.
    """
    found = [source] if source.is_file() else sorted(source.glob("**/*.tar"))
    if not found:
        raise DataError("holds no tar shards", where=source, expected="*.tar")
    return found


def webdataset_drives(
    shards: Sequence[Path], *, size: tuple[int, int] | None, channels: int
) -> Iterator[Drive]:
    """One drive for each run of samples of one `sequence` (or for each sample).

    Raises:
        DataError: a shard or a member cannot be read, or samples of one sequence hold different arrays.
    """
    name, frames, metadata, split = "", [], {}, None  # type: ignore[var-annotated]
    for shard in shards:
        for sample in _samples(shard):
            where = f"{shard}: {sample['__key__']}"
            arrays, about = _decoded(sample, size, channels, where)
            sequence = str(about.pop("sequence", sample["__key__"]))
            own_split = _split(about.pop("split", None), where)
            if frames and sequence != name:
                yield _drive(name, frames, metadata, split)
                frames = []
            if not frames:
                name, metadata, split = sequence, about, own_split
            if own_split != split:
                raise DataError(f"frames of {name} stand in two splits", where=where, found=f"{split} and {own_split}")
            metadata = {key: value for key, value in metadata.items() if key in about and about[key] == value}
            frames.append(arrays)
    if frames:
        yield _drive(name, frames, metadata, split)


def _samples(shard: Path) -> Iterator[Sample]:
    expand = require("webdataset.tariterators")  # not WebDataset itself: it leaves shards open where it raises
    try:
        with shard.open("rb") as stream:
            yield from expand.group_by_keys(expand.tar_file_expander([{"url": str(shard), "stream": stream}]))
    except DataError:
        raise
    except Exception as error:  # webdataset wraps whatever tarfile raises in errors of its own
        raise DataError(f"cannot be read as a WebDataset shard: {reason_of(error)}", where=shard) from error


def _decoded(sample: Sample, size: tuple[int, int] | None, channels: int, where: str) -> tuple[Arrays, Sample]:
    arrays: Arrays = {}
    about: Sample = {}
    for key, content in sample.items():
        if key.startswith("__"):
            continue
        name, _, kind = f".{key}".rpartition(".")
        name = name.strip(".")
        if f".{kind}" in SUFFIXES:
            arrays[name or "image"] = decode_image(content, size, channels, where=f"{where}.{key}")
        elif kind in ("cls", "txt"):
            arrays[name or "label"] = _number(content, f"{where}.{key}")
        elif kind in ("npy", "npz"):
            arrays |= _arrays(content, name or "array", kind, f"{where}.{key}")
        elif kind == "json":
            about |= _object(content, f"{where}.{key}")
    if not arrays:
        raise DataError("holds no array, image or class", where=where, found=", ".join(sample))
    return arrays, about


def _number(content: bytes, where: str) -> Array:
    try:
        return np.array(int(content.decode().strip()), np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError("is no whole number", where=where, found=repr(content[:20])) from error


def _arrays(content: bytes, name: str, kind: str, where: str) -> Arrays:
    try:
        if kind == "npy":
            return {name: np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)}
        bound_unpacked(content, "it")
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            return {key: found[key] for key in found.files}
    except (ValueError, OSError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error,
            NotImplementedError) as error:
        raise DataError(f"cannot be read as an array: {error}", where=where) from error


def _object(content: bytes, where: str) -> Sample:
    found = read_json(content, where)
    return found if isinstance(found, dict) else {"content": found}


def _split(value: object, where: str) -> str | None:
    if value in (None, ""):
        return None
    if value not in SPLITS:
        raise DataError("stands in an unknown split", where=where, expected=", ".join(SPLITS), found=value)
    return str(value)


def _drive(name: str, frames: Sequence[Arrays], metadata: Sample, split: str | None) -> Drive:
    first = {key: (array.shape, array.dtype) for key, array in frames[0].items()}
    for number, frame in enumerate(frames):
        if {key: (array.shape, array.dtype) for key, array in frame.items()} != first:
            raise DataError(f"frame {number} of {name} holds other arrays than its first", where="webdataset",
                            expected=first, found=sorted(frame))
    return Drive(safe_id(name), {key: np.stack([frame[key] for frame in frames]) for key in first}, metadata, split)

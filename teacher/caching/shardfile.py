"""One shard on disk: a safetensors file whose header also says which shard of which cache it is.

It is written here and not by `safetensors`, which copies every tensor to bytes first and would write an array that does
not lie in C order scrambled; and mapped here, since `safetensors` copies each tensor it returns.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fmdeploy import strictjson
from fmdeploy.errors import ArtifactError
from fmdeploy.task import Array, Arrays

CODES = {"F16": np.float16, "F32": np.float32, "I8": np.int8, "U8": np.uint8, "U16": np.uint16, "I32": np.int32}
NAME_OF = {np.dtype(kind): code for code, kind in CODES.items()}
METADATA = "__metadata__"
NOTE = "cache"
ALIGNMENT = 64
MAX_HEADER_BYTES = 2**20
AHEAD = 2
EAGER_BYTES = 2**24


def write_shard(target: Path, arrays: Arrays, metadata: Mapping[str, str]) -> None:
    """Write whole arrays; see `ShardWriter`."""
    with ShardWriter(target, {name: (array.dtype, array.shape) for name, array in arrays.items()}, metadata) as writer:
        writer.put(0, arrays)


class ShardWriter:
    """Writes a shard that is complete, on the disk and only then under its name; a leftover's name starts with a dot.

    Rows go to their places as they come, from a thread that also makes the disk begin: what remains to be waited for
    at the end is little, and nothing of a shard stays in memory.

    Args:
        target: Where it will lie.
        layout: Name → type and shape of the whole array.
        metadata: Strings of the header.
    """

    def __init__(self, target: Path, layout: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
                 metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {METADATA: dict(metadata)}
        self.target, self._unfinished = target, target.with_name(f".{target.name}.{os.getpid()}")
        self._row: dict[str, tuple[int, int]] = {}
        end = self._unsynced = 0
        for name, (dtype, shape) in sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])):  # aligned
            start, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": NAME_OF[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._row[name] = start, (end - start) // max(1, shape[0])
        text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self._base = 8 + len(text)
        self._handle = os.open(self._unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._write(0, len(text).to_bytes(8, "little") + text)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shard")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> ShardWriter:
        return self

    def put(self, first: int, arrays: Arrays) -> None:
        """Write rows from `first` on. The arrays must not change afterwards.

        Raises:
            OSError: the disk took no more, now or a moment ago.
        """
        self._waiting.append(self._thread.submit(self._put, first, arrays))
        while len(self._waiting) > AHEAD:
            self._waiting.popleft().result()

    def _put(self, first: int, arrays: Arrays) -> None:
        for name, array in arrays.items():
            start, row = self._row[name]
            self._write(self._base + start + first * row, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        if self._unsynced >= EAGER_BYTES:
            os.fdatasync(self._handle)
            self._unsynced = 0

    def _write(self, offset: int, content: bytes | memoryview) -> None:
        """One write may take only a part of it: Linux stops at 2 GiB."""
        view = memoryview(content)
        while len(view):
            written = os.pwrite(self._handle, view, offset)
            view, offset, self._unsynced = view[written:], offset + written, self._unsynced + written

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for each in self._waiting:
                    each.result()
                os.fsync(self._handle)
                os.replace(self._unfinished, self.target)
        finally:
            self._thread.shutdown(cancel_futures=True)
            os.close(self._handle)
            self._unfinished.unlink(missing_ok=True)


def map_safetensors(path: Path) -> Arrays:
    """Arrays over the memory-mapped safetensors file at `path`, read-only.

    Raises:
        ArtifactError: the header does not fit the file.
    """
    return map_shard(path)[0]


def map_shard(path: Path) -> tuple[Arrays, dict[str, str]]:
    """The arrays of a shard over its memory map, read-only, and the strings of its header.

    Raises:
        ArtifactError: it is no safetensors file, or its header does not fit it.
    """
    with path.open("rb") as stream:
        if os.fstat(stream.fileno()).st_size < 8:
            raise ArtifactError("is too short for a shard", where=path)
        view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    size = int.from_bytes(view[:8], "little")
    if size > min(MAX_HEADER_BYTES, len(view) - 8):
        raise ArtifactError("the length of the header does not fit the file", where=path)
    try:
        header = strictjson.loads(view[8 : 8 + size])
        metadata = header.pop(METADATA, {})
        found = {name: _mapped(view, 8 + size, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"the header does not fit the file: {error}", where=path) from error
    if not isinstance(metadata, dict):
        raise ArtifactError("the header does not fit the file: its metadata is no object", where=path)
    return found, metadata


def map_noted(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """The mapped arrays of a shard, and what it says of itself: `key`, `shard`, `arrays`, `sums`.

    Raises:
        ArtifactError: it is no shard of a feature cache.
    """
    arrays, metadata = map_shard(path)
    try:
        note = strictjson.loads(str(metadata.get(NOTE, "")).encode())
        if not (isinstance(note["key"], str) and isinstance(note["shard"], int)):
            raise ValueError("key or shard are of another type")
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"does not say which shard of which cache it is: {error}", where=path) from error
    return arrays, note


def _mapped(view: mmap.mmap, base: int, entry: Any) -> Array:
    dtype, shape, (start, end) = np.dtype(CODES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"{entry} holds something other than sizes")
    count = 1
    for axis in shape:  # in Python: numpy's product would wrap around
        count *= axis
    if end - start != dtype.itemsize * count or base + end > len(view):
        raise ValueError(f"{entry} lies outside")
    return np.frombuffer(view, dtype, count=count, offset=base + start).reshape(shape)

"""The process that opens a checkpoint which nobody vouches for, and writes its tensors as safetensors.

    python -m fmdeploy.teacher.importing.child SOURCE TARGET LIMIT_BYTES

It reads weights only: torch's unpickler knows tensors, numbers, texts and containers, and stops at every other name.
It runs under limits on memory, time and file size, so that a bomb ends here. One JSON line on stdout says
what was found, or why not.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_DEPTH = 16
MAX_TENSORS = 100_000
MAX_NAME = 512
GLOBAL = re.compile(r"(?:GLOBAL|global) `?([A-Za-z_][\w.]*)")
MAGIC_ZIP = b"PK\x03\x04"


class Refused(Exception):
    """Why the file is not read."""


def main() -> None:
    """See the top of this file."""
    source, target, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    try:
        reply: dict[str, Any] = convert(source, target, limit)
    except Refused as error:
        reply = {"refused": str(error)}
    except MemoryError:
        reply = {"refused": "needs more memory than it is given"}
    print(json.dumps(reply), flush=True)


def convert(source: Path, target: Path, limit: int) -> dict[str, Any]:
    """Read SOURCE, write TARGET; counts of what was found.

    Raises:
        Refused: with the reason.
    """
    from safetensors.torch import save_file

    if zipfile.is_zipfile(source):
        refuse_zip(source, limit)
    tensors: dict[str, Any] = {}
    others = 0
    for name, value in flat(read(source)):
        if not is_plain_tensor(value):
            others += 1
            continue
        if len(tensors) >= MAX_TENSORS or len(name) > MAX_NAME:
            raise Refused(f"holds more than {MAX_TENSORS} tensors, or names longer than {MAX_NAME} characters")
        tensors[name] = value
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    if total > limit:  # counted as they will be written: a stride of zero makes terabytes of one number
        raise Refused(f"its tensors hold {total} bytes, at most {limit} are read")
    if not tensors:
        raise Refused("holds no tensors")
    # A copy of each: tied weights are one storage under two names, which safetensors refuses.
    save_file({name: value.detach().contiguous().clone() for name, value in tensors.items()}, target)
    return {"tensors": len(tensors), "others": others}


def refuse_zip(source: Path, limit: int) -> None:
    """Look at the archive's directory before anything is unpacked.

    Raises:
        Refused: it is no archive of torch.save, or holds code, or unpacks to too much.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise Refused(f"is no readable archive: {error}") from error
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        raise Refused("holds two files of one name")
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        raise Refused("is a TorchScript archive, which holds code")
    if not any(name.endswith("data.pkl") for name in names):
        raise Refused("is a zip archive, but not one of torch.save")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Refused("is compressed, which torch.save never does: it may unpack to any size")
    if (total := sum(entry.file_size for entry in entries)) > limit:
        raise Refused(f"unpacks to {total} bytes, at most {limit} are read")


def read(source: Path) -> Any:
    """The content of a safetensors file or a torch checkpoint, weights only.

    Raises:
        Refused: it is neither, it is damaged, or it needs a name that no weights need.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if source.suffix == ".safetensors":
            return load_file(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to whoever wrote the file
            return torch.load(source, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise Refused(f"is not a safetensors file: {first(error)}") from error
    except pickle.UnpicklingError as error:
        raise Refused(why_unsafe(str(error))) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, ImportError,
            AssertionError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        if "allocate memory" in str(error):
            raise Refused("needs more memory than it is given") from error
        raise Refused(f"is damaged or is no torch checkpoint: {first(error)}") from error


def why_unsafe(text: str) -> str:
    """The unpickler's reason, without its advice to switch the protection off."""
    if found := GLOBAL.search(text):
        return f"holds code: reading it would call {found[1]}"
    if "legacy .tar" in text or "TorchScript" in text:
        return "is of an old format that can hold code"
    reason = text.rsplit("WeightsUnpickler error:", 1)[-1].split("Check the documentation", 1)[0]
    return f"holds more than weights: {' '.join(reason.split())[:200]}"


def first(error: Exception) -> str:
    """The first line of an error, shortened."""
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def flat(value: Any, at: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every leaf of nested mappings, its path joined by dots."""
    if not isinstance(value, Mapping):
        yield at, value
        return
    if depth > MAX_DEPTH:
        raise Refused(f"is nested deeper than {MAX_DEPTH} levels")
    for key, inner in value.items():
        yield from flat(inner, f"{at}.{key}" if at else str(key), depth + 1)


def is_plain_tensor(value: Any) -> bool:
    """Whether it is a dense tensor of numbers."""
    import torch

    return (isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized
            and value.device.type == "cpu")


if __name__ == "__main__":
    main()

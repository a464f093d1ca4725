"""Which code and which files a name such as `hf:FOLDER` or `package.module:Class` stands for, as a hash.

A name alone says nothing: the module behind it may be edited, the weights in the folder replaced. A configuration that
holds such a name also holds this hash, so that a changed source is never taken for "up to date".
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path


def source_digest(name: str) -> str | None:
    """sha256 of what `name` stands for; None for built-in names and packages that cannot be found.

    Args:
        name: `hf:FOLDER` (its configuration and weights), `package.module:attribute` (the module's file), or a
            built-in name.
    """
    scheme, colon, rest = name.partition(":")
    if not colon or scheme == "timm":
        return None
    if scheme == "hf":
        folder = Path(rest)
        return _digest(hugging_face_files(folder)) if folder.is_dir() else None
    try:
        spec = importlib.util.find_spec(scheme)
    except (ImportError, ValueError):
        return None
    return _digest([Path(spec.origin)]) if spec is not None and spec.origin and Path(spec.origin).is_file() else None


def hugging_face_files(folder: Path) -> list[Path]:
    """What is read of a Hugging Face folder: configuration and weights."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))


def _digest(files: Iterable[Path]) -> str:
    sha = hashlib.sha256()
    for file in files:
        sha.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                sha.update(chunk)
    return sha.hexdigest()

"""What an importer yields, and what it was made from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fmdeploy.arrays import Arrays
from fmdeploy.errors import DataError

UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
CHUNK = 2**20


class Drive(NamedTuple):
    """One continuous recording.

    Attributes:
        id: Usable as a file name (`safe_id`).
        arrays: Name → (T, ...).
        metadata: Plain JSON values.
        split: Where its source puts it; None: the rules of the import decide.
    """

    id: str
    arrays: Arrays
    metadata: Mapping[str, Any]
    split: str | None = None


def safe_id(name: str) -> str:
    """`name` as a sequence id: everything but letters, digits, _ and - becomes one dash.

    Raises:
        DataError: nothing is left.
    """
    found = UNSAFE.sub("-", name).strip("-_")
    if not found:
        raise DataError("is no usable name of a sequence", where=repr(name)[:60])
    return found[:200]


def content_digest(root: Path, files: Iterable[Path]) -> str:
    """sha256 over names (relative to `root`) and bytes: what an import was made from.

    Raises:
        DataError: a file is none, or a link that leads out of `root`.
    """
    sha = hashlib.sha256()
    for path in sorted(files):
        require_inside(root, path)
        sha.update(f"{path.relative_to(root).as_posix()}\n{path.stat().st_size}\n".encode())
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                sha.update(chunk)
    return sha.hexdigest()


def require_inside(root: Path, path: Path) -> None:
    """Refuse what is not a regular file below `root`, links followed.

    Raises:
        DataError: it is missing, a device or FIFO, or lies elsewhere.
    """
    if not path.is_file():
        raise DataError("is not a regular file", where=path)
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError("leads out of the folder that is imported", where=path, found=path.resolve())

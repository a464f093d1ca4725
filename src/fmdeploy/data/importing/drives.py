"""What an importer yields, and what it was made from."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fmdeploy.arrays import Arrays
from fmdeploy.errors import DataError

UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
SEPARATORS = re.compile(r"[/. ]+")
LONGEST = 90  # a name in a tar of the USTAR format has at most 100 characters
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
    """`name` as a sequence id: at most 90 letters, digits, _ and -.

    Slashes, dots and blanks become dashes. Where more is lost, as in the names of another script, eight digits of a
    hash of the name follow, so that different names stay different.
    """
    found = UNSAFE.sub("-", name).strip("-_")
    if found and found == SEPARATORS.sub("-", name).strip("-_")[:LONGEST]:
        return found
    return f"{found[: LONGEST - 9]}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}".lstrip("-")


def read_json(content: bytes, where: object) -> Any:
    """JSON as others write it: duplicate keys and byte order marks pass, NaN and infinity do not.

    Raises:
        DataError: it is none, or nests too deep.
    """
    try:
        return json.loads(content, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON: {error}", where=where) from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number that JSON has")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def reason_of(error: Exception) -> str:
    """What an exception of another package says, on one line, without addresses in memory."""
    said = next((part for part in error.args if isinstance(part, str)), "") or str(error)
    return re.sub(r"<[^<>]* (at 0x[0-9a-f]+|name='[^']*')>", "it", " ".join(said.split()))[:160] or type(error).__name__


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

"""Reading what may not be there: files of /proc and /sys, which vanish, fail, or hold anything. UNKNOWN is None."""

from __future__ import annotations

import math
import os
from pathlib import Path

MAX_BYTES = 1 << 20


def read_text(path: Path, limit: int = MAX_BYTES) -> str | None:
    """Return a file's text, at most `limit` bytes of it; None where it cannot be read. Bad UTF-8 is replaced.

    It never waits: a FIFO that stands in for a file is empty, or unreadable.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        return _read(handle, limit).decode("utf-8", errors="replace")
    except OSError:
        return None
    finally:
        os.close(handle)


def _read(handle: int, limit: int) -> bytes:
    parts: list[bytes] = []
    while limit > 0 and (chunk := os.read(handle, min(limit, 1 << 16))):
        parts.append(chunk)
        limit -= len(chunk)
    return b"".join(parts)


def read_number(path: Path) -> float | None:
    """Return the one finite number that a file holds; None where it holds anything else."""
    return number((read_text(path, 64) or "").strip("\0 \n\t"))


def read_int(path: Path) -> int | None:
    """Return the one integer that a file holds; None where it holds anything else."""
    found = read_number(path)
    return int(found) if found is not None and found == int(found) else None


def read_word(path: Path) -> str:
    """Return a file's text without the NUL and white space around it; empty where it cannot be read."""
    return (read_text(path, 4096) or "").strip("\0 \n\t")


def number(text: str) -> float | None:
    """Return a finite number, with a point or a comma; None where the text is none."""
    try:
        found = float(text.replace(",", "."))
    except ValueError:
        return None
    return found if math.isfinite(found) and len(text) <= 32 else None


def children(folder: Path, pattern: str) -> list[Path]:
    """Return the entries of a folder that match, in order; none where it cannot be listed."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []

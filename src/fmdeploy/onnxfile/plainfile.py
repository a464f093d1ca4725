"""Opening a file that somebody else named: a regular file, seen through one descriptor, and never waited for."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fmdeploy.errors import ModelFileError


@contextmanager
def plain_file(path: Path, *, follow: bool = True) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """Open a regular file for reading; a FIFO or a device is refused at once.

    Args:
        path: The file.
        follow: Whether it may be a symbolic link.

    Raises:
        OSError: it cannot be opened.
        ModelFileError: it is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError("is no plain file", found=_kind(status.st_mode), fix="Name the file itself")
        with open(handle, "rb", closefd=False) as file:
            yield file, status
    finally:
        os.close(handle)


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    return "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "something else"

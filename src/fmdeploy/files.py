"""Files that are complete or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text in one step; an older file is replaced, a failure leaves it as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def is_no_space(error: BaseException | None) -> bool:
    """Whether a full disk is behind `error`; safetensors and tar writers wrap the OSError in their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False

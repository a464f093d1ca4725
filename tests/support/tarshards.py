"""Tar shards and arrays as bytes, as other tools write them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def shard(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar file of these members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def npy(array: Any) -> bytes:
    """What `numpy.save` writes."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()

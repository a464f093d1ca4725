"""Copies of the repository as a fresh clone would hold it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def tracked_copy(root: Path, target: Path) -> Path:
    """What a fresh clone would hold: files that git does not ignore, links kept as links."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root,
                            check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        source, copy = root / name, target / name
        if os.path.lexists(source):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    return target

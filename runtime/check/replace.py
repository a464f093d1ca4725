"""Putting a new measurement where an old one is: a CHECK is replaced in one step, or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.errors import ArtifactError
from fmdeploy.manifest import Kind, read_manifest

AT_FDCWD, RENAME_EXCHANGE = -100, 2


def produce_again(out: Path, stage: str, write: Callable[[Path], Artifact], *, again: bool) -> Artifact:
    """Write a CHECK to `out`; a measurement is never taken from the shelf.

    Args:
        out: Where to.
        stage: What wrote the CHECK that may be replaced.
        write: Writes the artifact to the folder that it is given.
        again: Replace a CHECK of `stage` that is already there, once the new one is complete.

    Raises:
        ArtifactError: Something is at `out` that may not be replaced.
    """
    if not os.path.lexists(out) or (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        return write(out)
    if not again:
        raise ArtifactError("already exists, and a measurement is not repeated unasked", where=out,
                            fix="Choose another --out, or replace it with --again")
    _require_check(out, stage)
    fresh = out.with_name(f".{out.name}.again")
    shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed: nothing else writes that name
    write(fresh)
    exchange(fresh, out)
    shutil.rmtree(fresh)
    return open_artifact(out, Kind.CHECK)


def _require_check(out: Path, stage: str) -> None:
    """Only what `stage` wrote may be replaced; it may well be damaged."""
    manifest = None if out.is_symlink() else read_manifest(out)
    if manifest is None or (manifest.kind, manifest.stage) != (Kind.CHECK, stage):
        found = "a link" if manifest is None else f"{manifest.kind.value} of {manifest.stage}"
        raise ArtifactError("is not a CHECK that may be replaced", where=out, expected=f"CHECK of {stage}", found=found,
                            fix="Choose another --out")


def exchange(one: Path, other: Path) -> None:
    """Let two folders trade names: in one step where the file system can, else with a moment in between."""
    names = os.fsencode(one), os.fsencode(other)
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return
    aside = other.with_name(f".{other.name}.old")
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)

"""Find the engine of one model for this machine in a folder, and read it: hashed before anything parses it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fmdeploy.artifact import open_artifact
from fmdeploy.errors import ArtifactError
from fmdeploy.manifest import MANIFEST_NAME, Kind, Manifest, read_manifest
from fmdeploy.runtime.backends.planfault import PlanError, PlanFault, check_length
from fmdeploy.runtime.engines.key import BuildRequest, mismatch

PLAN = "engine.plan"
MOST_ENGINES = 64  # a folder holds one engine a variant and board, not thousands


@dataclass(frozen=True)
class Engine:
    """An engine that belongs here.

    Attributes:
        root: Folder of the artifact.
        plan: Its bytes, exactly those that were hashed.
        digest: Identity of the artifact.
        note: What is worth knowing, such as another power mode; may be empty.
    """

    root: Path
    plan: bytes
    digest: str
    note: str = ""


def find_engine(folder: Path, wanted: BuildRequest) -> Engine:
    """Return the engine that was built from this model for this machine.

    Args:
        folder: An ENGINE, or a folder of them.
        wanted: What it must have been built for, see `key.request_here`.

    Raises:
        PlanError: there is none, or the only ones that come into question do not belong here or are damaged; the code
            says which.
    """
    faults: list[PlanError] = []
    for root, manifest in _ranked(folder, wanted):
        try:
            return _read(root, manifest, wanted)
        except PlanError as error:
            faults.append(error)
    if not faults:
        raise PlanError(PlanFault.MISSING, f"there is no engine of {wanted.variant} here", where=folder)
    raise faults[0]


def _ranked(folder: Path, wanted: BuildRequest) -> list[tuple[Path, Manifest]]:
    """Engines of this variant: those of this very model first, and of those, the one built in today's power mode."""
    found = []
    for root in _candidates(folder):
        try:
            manifest = read_manifest(root)
        except ArtifactError:  # half-written, or no artifact: not an engine of ours
            continue
        if manifest.kind is Kind.ENGINE and manifest.config.get("variant") == wanted.variant:
            found.append((root, manifest))
    keys = ("model_sha256", "version", "sm", "multiprocessors", "l4t", "power_mode")
    return sorted(found, key=lambda item: [item[1].config.get(key) != getattr(wanted, key) for key in keys])


def _candidates(folder: Path) -> list[Path]:
    if (folder / MANIFEST_NAME).is_file():
        return [folder]
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
    except OSError:
        return []
    return [path for path in inside[:MOST_ENGINES] if (path / MANIFEST_NAME).is_file()]


def _read(root: Path, manifest: Manifest, wanted: BuildRequest) -> Engine:
    where = root / PLAN
    if (problem := mismatch(manifest.config, wanted, where)) is not None:
        raise problem
    try:
        plan = _verified(root, manifest)
    except PlanError as error:
        error.root = root
        raise
    mode, here = manifest.config.get("power_mode"), wanted.power_mode
    return Engine(root, plan, manifest.digest, f"built in power mode {mode}, this is {here}" if mode != here else "")


def _verified(root: Path, manifest: Manifest) -> bytes:
    """The plan's bytes, exactly those that were sealed: TensorRT gets to see no others."""
    where = root / PLAN
    _check_size(where, manifest)
    try:
        open_artifact(root, Kind.ENGINE)
        plan = where.read_bytes()
    except (ArtifactError, OSError) as error:
        raise PlanError(PlanFault.ALTERED, str(error)) from error
    if hashlib.sha256(plan).hexdigest() != manifest.files[PLAN].sha256:
        raise PlanError(PlanFault.ALTERED, "holds other bytes than those that were sealed", where=where)
    check_length(plan, where)
    return plan


def _check_size(where: Path, manifest: Manifest) -> None:
    """Tell a file that was cut short from one that was changed."""
    if PLAN not in manifest.files:
        raise PlanError(PlanFault.MISSING, "the artifact lists no plan", where=where)
    try:
        size = where.stat().st_size
    except OSError as error:
        raise PlanError(PlanFault.MISSING, f"cannot be read: {error.strerror}", where=where) from error
    sealed = manifest.files[PLAN].size
    if size == 0 and sealed:
        raise PlanError(PlanFault.EMPTY, "the plan holds no bytes", where=where, expected=f"{sealed} bytes")
    if size < sealed:
        raise PlanError(PlanFault.TRUNCATED, "its tail is missing", where=where, expected=f"{sealed} bytes", found=size)

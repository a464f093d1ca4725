"""Artifacts: directories that open only when every byte is what the manifest says."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmdeploy.errors import ArtifactError
from fmdeploy.manifest import MANIFEST_NAME, FileEntry, Kind, Manifest, Parent, read_manifest

CHUNK = 1 << 20


@dataclass(frozen=True)
class Artifact:
    """A verified artifact on disk. Treat the folder as read-only."""

    root: Path
    manifest: Manifest

    @property
    def kind(self) -> Kind:
        """What it is."""
        return self.manifest.kind

    @property
    def digest(self) -> str:
        """Its identity: 64 hex digits."""
        return self.manifest.digest

    @property
    def inputs(self) -> Mapping[str, Parent]:
        """Role → the artifact it was made from."""
        return self.manifest.inputs

    def has(self, name: str) -> bool:
        """Whether the payload holds the file `name`."""
        return name in self.manifest.files

    def path(self, name: str) -> Path:
        """Path of the payload file `name`.

        Raises:
            ArtifactError: the manifest lists no such file.
        """
        if name not in self.manifest.files:
            raise ArtifactError(f"holds no file {name}", where=self.root, fix=f"It is a {self.kind.value}")
        return self.root / name

    def json(self, name: str) -> Any:
        """The payload file `name`, parsed as JSON."""
        return json.loads(self.path(name).read_bytes())

    def tensors(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        """The payload file `name`, read as safetensors into numpy arrays."""
        from safetensors.numpy import load_file

        return dict(load_file(self.path(name)))

    def parent(self) -> Parent:
        """This artifact as an input of another one."""
        return self.manifest.as_parent()


def open_artifact(root: Path | str, *kinds: Kind) -> Artifact:
    """Open and verify the artifact at `root`: manifest, kind, the set of files, every size and every hash.

    Args:
        root: The artifact's directory.
        kinds: The kinds that are welcome; none means any.

    Raises:
        ArtifactError: it is missing, of another kind, has extra or missing files, or one was altered.
    """
    root = Path(root)
    manifest = read_manifest(root)
    if kinds and manifest.kind not in kinds:
        wanted = " or ".join(k.value for k in kinds)
        raise ArtifactError("is an artifact of another kind", where=root, expected=wanted, found=manifest.kind.value)
    _verify_listing(root, set(manifest.files))
    for name, entry in manifest.files.items():
        _verify_file(root / name, entry)
    return Artifact(root, manifest)


def payload_files(root: Path) -> set[str]:
    """Relative names of all files below `root`, the manifest left out."""
    found = {(Path(top) / name).relative_to(root).as_posix() for top, _, names in os.walk(root) for name in names}
    return found - {MANIFEST_NAME}


def entry_of(path: Path) -> FileEntry:
    """Hash and size of one file."""
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            sha.update(chunk)
    return FileEntry(sha256=sha.hexdigest(), size=path.stat().st_size)


def _verify_listing(root: Path, listed: set[str]) -> None:
    found = payload_files(root)
    remedy = "Re-run the stage that wrote it"
    if missing := sorted(listed - found):
        raise ArtifactError(f"lacks the file {missing[0]}", where=root, fix=remedy)
    if extra := sorted(found - listed):
        raise ArtifactError(f"holds a file that its manifest does not list: {extra[0]}", where=root, fix="Remove it")


def _verify_file(path: Path, entry: FileEntry) -> None:
    remedy = "Re-run the stage that wrote it"
    if path.is_symlink() or not path.is_file():
        raise ArtifactError("is not a regular file", where=path, fix=remedy)
    if (size := path.stat().st_size) != entry.size:
        raise ArtifactError("has another size", where=path, expected=entry.size, found=size, fix=remedy)
    if (found := entry_of(path).sha256) != entry.sha256:
        raise ArtifactError(
            "was altered: sha256 differs", where=path, expected=entry.sha256[:12], found=found[:12], fix=remedy
        )

"""Artifacts: directories that open only when every byte is what the manifest says."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fmdeploy import strictjson
from fmdeploy.errors import ArtifactError
from fmdeploy.manifest import (
    FOR_DEVICES,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    FileEntry,
    Kind,
    Manifest,
    Parent,
    manifest_bytes,
    parse_manifest,
)
from fmdeploy.plainfiles import CHUNK, names_below, open_folder, read_below, verify_below


@dataclass(frozen=True)
class Artifact:
    """A verified artifact on disk. Treat the folder as read-only.

    What is parsed through it (`json`, `tensors`, `read`) is parsed from the very bytes that were hashed.
    """

    root: Path
    manifest: Manifest
    held: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    """Bytes of payload files that were asked for when it was opened."""
    manifest_sha256: str = field(default="", compare=False)
    """sha256 of the file manifest.json that was read; empty where the artifact was written just now."""

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

    def read(self, name: str) -> bytes:
        """The bytes of the payload file `name`, hashed before they are given out.

        Raises:
            ArtifactError: the manifest lists no such file, or it changed since the artifact was opened.
        """
        if name in self.held:
            return self.held[name]
        self.path(name)
        entry = self.manifest.files[name]
        with open_folder(self.root) as folder:
            return read_below(folder, name, self.root, size=entry.size, sha256=entry.sha256,
                              single=self.kind in FOR_DEVICES)

    def json(self, name: str) -> Any:
        """The payload file `name`, parsed as strict JSON.

        Raises:
            ArtifactError: it is no strict JSON, or no longer what the manifest says.
        """
        try:
            return strictjson.loads(self.read(name))
        except ValueError as error:
            raise ArtifactError(f"is not strict JSON: {error}", where=self.path(name)) from error

    def tensors(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        """The payload file `name`, read as safetensors into numpy arrays.

        Raises:
            ArtifactError: it is no safetensors file, or no longer what the manifest says.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            return dict(load(self.read(name)))
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"is not a safetensors file: {error}", where=self.path(name)) from error

    def parent(self) -> Parent:
        """This artifact as an input of another one."""
        return self.manifest.as_parent()


def open_artifact(root: Path | str, *kinds: Kind, hold: Collection[str] = ()) -> Artifact:
    """Open and verify the artifact at `root`: manifest, kind, the set of files, every size and every hash.

    Args:
        root: The artifact's directory.
        kinds: The kinds that are welcome; none means any.
        hold: Payload files, where there are such, whose verified bytes are kept: they are read once.

    Raises:
        ArtifactError: it is missing, of another kind, has extra or missing files, or one was altered.
    """
    root = Path(root)
    with open_folder(root) as folder:
        raw = manifest_bytes(folder, root)
        manifest = parse_manifest(raw, root / MANIFEST_NAME)
        if kinds and manifest.kind not in kinds:
            wanted = " or ".join(k.value for k in kinds)
            raise ArtifactError("is an artifact of another kind", where=root, expected=wanted,
                                found=manifest.kind.value)
        _verify_listing(names_below(folder, root), manifest, root)
        held = _verify_files(folder, root, manifest, hold)
    return Artifact(root, manifest, held, hashlib.sha256(raw).hexdigest())


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


def _verify_listing(found: set[str], manifest: Manifest, root: Path) -> None:
    listed = set(manifest.files)
    beside = {MANIFEST_NAME, SIGNATURE_NAME} if manifest.kind is Kind.BUNDLE else {MANIFEST_NAME}
    if missing := sorted(listed - found):
        raise ArtifactError(f"lacks the file {missing[0]}", where=root, fix="Re-run the stage that wrote it")
    if extra := sorted(found - listed - beside):
        raise ArtifactError(f"holds a file that its manifest does not list: {extra[0]}", where=root, fix="Remove it")


def _verify_files(folder: int, root: Path, manifest: Manifest, hold: Collection[str]) -> dict[str, bytes]:
    held: dict[str, bytes] = {}
    single = manifest.kind in FOR_DEVICES
    for name, entry in manifest.files.items():
        if name in hold:
            held[name] = read_below(folder, name, root, size=entry.size, sha256=entry.sha256, single=single)
        else:
            verify_below(folder, name, root, size=entry.size, sha256=entry.sha256, single=single)
    return held

"""The manifest: what an artifact is, where it came from and what it holds.

`manifest.json` is canonical JSON (sorted keys, no NaN, UTF-8). Two hashes guard it:
`digest` covers everything but the environment and is the artifact's identity;
`seal` covers every key, so that no byte of the manifest can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fmdeploy.errors import ArtifactError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 32 * 2**20
SHA256 = r"^[0-9a-f]{64}$"


class Kind(str, Enum):
    """What an artifact is."""

    DATASET = "DATASET"
    TEACHER = "TEACHER"
    FEATURES = "FEATURES"
    STUDENT = "STUDENT"
    QUANTIZED = "QUANTIZED"
    BUNDLE = "BUNDLE"
    ENGINE = "ENGINE"
    CHECK = "CHECK"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    """One payload file: its content hash and its size in bytes."""

    sha256: str = Field(pattern=SHA256)
    size: int = Field(ge=0)


class Parent(_Strict):
    """An input of an artifact, with that input's own inputs: the lineage travels with the child."""

    kind: Kind
    stage: str
    digest: str = Field(pattern=SHA256)
    inputs: dict[str, Parent] = {}


class Manifest(_Strict):
    """The content of `manifest.json` without its seal."""

    kind: Kind
    schema_version: int
    stage: str
    config: dict[str, Any]
    inputs: dict[str, Parent]
    files: dict[str, FileEntry]
    environment: dict[str, Any]

    @field_validator("files")
    @classmethod
    def _names_stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name or name == MANIFEST_NAME:
                raise ValueError(f"file name {name!r} leaves the artifact")
        return files

    @property
    def digest(self) -> str:
        """Identity of the artifact: sha256 over everything but the environment."""
        return _sha256(self.model_dump(mode="json", exclude={"environment"}))

    def key(self) -> str:
        """Identity of the *request*: equal for two runs of one stage with equal configuration and inputs."""
        return request_key(self.kind, self.stage, self.config, self.inputs)

    def as_parent(self) -> Parent:
        """This artifact as it appears in the manifest of a child."""
        return Parent(kind=self.kind, stage=self.stage, digest=self.digest, inputs=self.inputs)

    def to_bytes(self) -> bytes:
        """The file `manifest.json`."""
        body = self.model_dump(mode="json")
        return (json.dumps({**body, "seal": _sha256(body)}, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def request_key(kind: Kind, stage: str, config: dict[str, Any], inputs: dict[str, Parent]) -> str:
    """sha256 of what was asked for, before anything is computed."""
    roles = {role: parent.digest for role, parent in inputs.items()}
    return _sha256({"kind": kind.value, "stage": stage, "config": config, "inputs": roles})


def read_manifest(root: Path) -> Manifest:
    """Read, bound, unseal and validate `root/manifest.json`.

    Raises:
        ArtifactError: it is missing, not a regular file, too large, not strict JSON, altered or of another schema.
    """
    path = root / MANIFEST_NAME
    if not root.exists():
        raise ArtifactError("no such artifact", where=root, fix="Check the path, or run the stage that writes it")
    if path.is_symlink() or not path.is_file():
        raise ArtifactError("is not an fmdeploy artifact: it has no manifest.json", where=root)
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ArtifactError("is too large", where=path, expected=f"at most {MAX_MANIFEST_BYTES} bytes")
    return _parse(path.read_bytes(), path)


def _parse(raw: bytes, path: Path) -> Manifest:
    remedy = "The artifact was altered or cut short: re-run the stage that wrote it"
    try:
        body = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"is not strict JSON: {error}", where=path, fix=remedy) from error
    if not isinstance(body, dict):
        raise ArtifactError("is not a JSON object", where=path, fix=remedy)
    if (version := body.get("schema_version")) != SCHEMA_VERSION:
        raise ArtifactError(
            "has another schema version", where=path, expected=SCHEMA_VERSION, found=version, fix="Re-run the stage"
        )
    seal = body.pop("seal", None)
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"is not valid at {place!r}: {first['msg']}", where=path, fix=remedy) from error
    if seal != _sha256(body):
        raise ArtifactError("does not match its seal", where=path, fix=remedy)
    return manifest


def canonical(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _sha256(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("duplicate key")
    return out


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")

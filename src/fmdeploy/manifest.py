"""The manifest: what an artifact is, where it came from and what it holds.

`manifest.json` is canonical JSON (sorted keys, no NaN, UTF-8). Two hashes guard it:
`digest` covers everything but the environment and is the artifact's identity;
`seal` covers every key, so that no byte of the manifest can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from fmdeploy import strictjson
from fmdeploy.errors import ArtifactError
from fmdeploy.likely import cause_of
from fmdeploy.plainfiles import HEAD_BYTES, open_below, open_folder, read_at_most
from fmdeploy.record import Field, Record, RecordError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "model.sig"  # the one file of a BUNDLE that no manifest lists: it signs the manifest
MAX_MANIFEST_BYTES = 32 * 2**20
SHA256 = r"^[0-9a-f]{64}$"
# What goes to a device is bounded: a bundle that does not fit is no bundle.
MAX_DEVICE_FILES = 1000
MAX_DEVICE_BYTES = 8 * 2**30


class Kind(str, Enum):
    """What an artifact is."""

    DATASET = "DATASET"
    TEACHER = "TEACHER"
    ADAPTER = "ADAPTER"
    FEATURES = "FEATURES"
    STUDENT = "STUDENT"
    QUANTIZED = "QUANTIZED"
    BUNDLE = "BUNDLE"
    ENGINE = "ENGINE"
    CHECK = "CHECK"
    EVALUATION = "EVALUATION"
    PROBE = "PROBE"


FOR_DEVICES = (Kind.BUNDLE, Kind.ENGINE)
STAGE = r"^[ -~]*$"
EVALUATED_ON = "evaluation_data"
"""Role of a dataset that a stage measures its result on and learns nothing from."""


class FileEntry(Record):
    """One payload file: its content hash and its size in bytes."""

    sha256: str = Field(pattern=SHA256)
    size: int = Field(ge=0)


class Parent(Record):
    """An input of an artifact, with that input's own inputs: the lineage travels with the child."""

    kind: Kind
    stage: str = Field(max_length=100, pattern=STAGE)
    digest: str = Field(pattern=SHA256)
    inputs: dict[str, Parent] = Field(default_factory=dict)


class Manifest(Record):
    """The content of `manifest.json` without its seal."""

    kind: Kind
    schema_version: int
    stage: str = Field(max_length=100, pattern=STAGE)
    config: dict[str, Any]
    inputs: dict[str, Parent]
    files: dict[str, FileEntry]
    environment: dict[str, Any]

    def _agree(self) -> None:
        for name in self.files:
            if why := unusable_name(name):
                raise ValueError(f"files: file name {name[:80]!r} {why}")
        if self.kind in FOR_DEVICES:
            total = sum(entry.size for entry in self.files.values())
            if len(self.files) > MAX_DEVICE_FILES or total > MAX_DEVICE_BYTES:
                raise ValueError(f"{len(self.files)} files of {total} bytes are more than a device takes")

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


def numbered_role(role: str, number: int) -> str:
    """Role of the artifact `number` (from 0) of several: `teacher`, `teacher2`, `teacher3` and so on."""
    return f"{role}{number + 1}" if number else role


def learnt_from(inputs: Mapping[str, Parent]) -> list[Parent]:
    """Inputs but the dataset that a stage was only evaluated on."""
    return [parent for role, parent in inputs.items() if role != EVALUATED_ON]


def ancestors_learnt_from(inputs: Mapping[str, Parent]) -> Iterator[Parent]:
    """Everything that something learnt from, directly or not, and what that was made from."""
    for parent in learnt_from(inputs):
        yield parent
        yield from ancestors_learnt_from(parent.inputs)


def datasets_learnt_from(inputs: Mapping[str, Parent]) -> Iterator[Parent]:
    """The datasets that something and its ancestors learnt from, not what those were split or joined from."""
    for parent in learnt_from(inputs):
        if parent.kind is Kind.DATASET:
            yield parent
        else:
            yield from datasets_learnt_from(parent.inputs)


def unusable_name(name: str) -> str:
    """Why `name` cannot name a payload file; empty where it can."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name or name in ("", "."):
        return "leaves the artifact"
    if name in (MANIFEST_NAME, SIGNATURE_NAME):
        return "leaves the artifact: it describes the payload and is no part of it"
    if not name.isprintable() or len(name) > 1000 or max(len(part.encode()) for part in path.parts) > 255:
        return "is not a name that a file system takes"  # also lone surrogates, which are not printable
    return ""


def read_manifest(root: Path) -> Manifest:
    """Read, bound, unseal and validate `root/manifest.json`.

    Raises:
        ArtifactError: it is missing, not a regular file, too large, not strict JSON, altered or of another schema.
    """
    with open_folder(root) as folder:
        return parse_manifest(manifest_bytes(folder, root), root / MANIFEST_NAME)


def manifest_bytes(folder: int, root: Path) -> bytes:
    """The bytes of the manifest below an open folder.

    Raises:
        ArtifactError: it is missing, not a regular file, or too large.
    """
    path = root / MANIFEST_NAME
    try:
        with open_below(folder, MANIFEST_NAME, root) as (stream, status):
            raw = b"" if status.st_size > MAX_MANIFEST_BYTES else read_at_most(stream, MAX_MANIFEST_BYTES + 1)
            size = max(status.st_size, len(raw))
    except ArtifactError as error:
        if "permissions" in (error.fix or ""):
            raise
        raise ArtifactError("is not an fmdeploy artifact: it has no manifest.json that is a file", where=root
                            ) from error
    if size > MAX_MANIFEST_BYTES:
        raise ArtifactError("is too large", where=path, expected=f"at most {MAX_MANIFEST_BYTES} bytes", found=size)
    return raw


def parse_manifest(raw: bytes, path: Path) -> Manifest:
    """Unseal and validate the bytes of a manifest; `path` is for messages.

    Raises:
        ArtifactError: it is not strict JSON, altered or of another schema.
    """
    remedy = "The artifact was altered or cut short: re-run the stage that wrote it"
    try:
        if cause := cause_of(raw[:HEAD_BYTES]):
            raise ValueError(cause)
        if b"\r" in raw:
            raise ValueError("its lines end in CR LF: it was copied by something that converts text")
        body = strictjson.loads(raw)
    except ValueError as error:
        raise ArtifactError(f"is not strict JSON: {error}", where=path, fix=remedy) from error
    if not isinstance(body, dict):
        raise ArtifactError("is not a JSON object", where=path, fix=remedy)
    if (version := body.get("schema_version")) != SCHEMA_VERSION:
        raise ArtifactError(
            "has another schema version", where=path, expected=SCHEMA_VERSION, found=repr(version)[:80],
            fix="Re-run the stage"
        )
    seal = body.pop("seal", None)
    try:
        manifest = Manifest.model_validate(body)
    except RecordError as error:
        first = error.problems[0]
        place = ".".join(map(str, first.place))[:200]
        raise ArtifactError(f"is not valid at {place!r}: {first.text}", where=path, fix=remedy) from error
    if seal != _sha256(body):
        raise ArtifactError("does not match its seal", where=path, fix=remedy)
    return manifest


def canonical(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _sha256(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()

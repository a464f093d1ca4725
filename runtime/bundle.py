"""A verified bundle: everything the device needs, read once and typed.

Legend: N golden samples, C channels of one input.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fmdeploy.arrays import Arrays
from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.budgets import Budgets, read_budgets
from fmdeploy.config import validate
from fmdeploy.errors import ArtifactError, ModelFileError
from fmdeploy.iospec import IOSpec
from fmdeploy.manifest import Kind

# The key "location" of an external-data entry, as protobuf spells it inside TensorProto.external_data. Old onnxruntime
# follows such entries through "..", absolute paths and links, and one crafted location crashes it, so a file that
# mentions one is refused before onnxruntime sees it. onnx itself is not installed on the device.
EXTERNAL_DATA_MARK = b"\x0a\x08location"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class VariantTolerance(_Strict):
    """How far a variant's outputs may be from the golden ones on another machine."""

    sqnr_db: float = Field(description="Smallest signal-to-quantisation-noise ratio, in dB, over all golden samples")


class GoldenIndex(_Strict):
    """golden.json."""

    variants: dict[str, VariantTolerance]
    samples: tuple[str, ...] = ()
    saturates_without_vnni: tuple[str, ...] = Field(
        default=(), description="Layers of int8-cpu whose 8-bit products may saturate on x86 without VNNI"
    )


class InputStatistics(_Strict):
    """What the calibration set looked like to one input."""

    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...] = Field(description="Spread of the per-sample channel means")
    min: float | None = None
    max: float | None = None


class StatisticsFile(_Strict):
    """input_statistics.json."""

    inputs: dict[str, InputStatistics]


@dataclass(frozen=True)
class Golden:
    """Golden inputs by name (N, ...), expected outputs by variant and name (N, ...), and tolerances."""

    inputs: Arrays
    outputs: dict[str, Arrays]
    index: GoldenIndex

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def sample(self, number: int) -> Arrays:
        """Return the inputs of one golden sample, without batch axis."""
        return {name: array[number] for name, array in self.inputs.items()}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; every byte was verified against the manifest."""

    artifact: Artifact
    io: IOSpec
    golden: Golden
    statistics: dict[str, InputStatistics]
    budgets: Budgets

    @property
    def digest(self) -> str:
        """Identity of the bundle."""
        return self.artifact.digest

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the model variants in the bundle, such as `fp32` and `int8-cpu`."""
        names = (name for name in self.artifact.manifest.files if "/" not in name)
        return tuple(n.removeprefix("model.").removesuffix(".onnx") for n in names
                     if n.startswith("model.") and n.endswith(".onnx"))

    def model_sha256(self, variant: str) -> str:
        """Return the sha256 of one variant's file, as the manifest states it."""
        self.artifact.path(f"model.{variant}.onnx")
        return self.artifact.manifest.files[f"model.{variant}.onnx"].sha256

    def model_bytes(self, variant: str) -> bytes:
        """Read one variant's file once and return exactly the bytes that were verified.

        Raises:
            ArtifactError: The bundle has no such variant, or the file changed since it was opened.
            ModelFileError: The model wants data from outside the file.
        """
        path = self.artifact.path(f"model.{variant}.onnx")
        entry = self.artifact.manifest.files[path.name]
        raw = _read_regular(path, entry.size)
        if hashlib.sha256(raw).hexdigest() != entry.sha256:
            raise ArtifactError("was altered since the bundle was opened", where=path, fix="Export the bundle again")
        if EXTERNAL_DATA_MARK in raw:
            raise ModelFileError("refers to data outside the file", where=path, fix="Export it as a single file")
        return raw


def open_bundle(root: Path | str | Bundle) -> Bundle:
    """Open and verify a bundle.

    Raises:
        ArtifactError: It is missing, altered, of another kind, or its files contradict each other.
        ConfigError: budgets.toml is not valid.
    """
    if isinstance(root, Bundle):
        return root
    artifact = open_artifact(Path(root), Kind.BUNDLE)
    io = _parse(IOSpec, artifact, "io.json")
    statistics = _parse(StatisticsFile, artifact, "input_statistics.json").inputs
    golden = _golden(artifact, io)
    for spec in io.inputs:
        if spec.name not in statistics:
            raise ArtifactError("has no statistics of an input", where=artifact.root, expected=spec.name)
    return Bundle(artifact, io, golden, statistics, read_budgets(artifact.path("budgets.toml")))


def _parse(model: type[Any], artifact: Artifact, name: str) -> Any:
    raw = artifact.json(name)
    if not isinstance(raw, dict):
        raise ArtifactError("is not a JSON object", where=artifact.path(name))
    return validate(model, raw, where=artifact.path(name))


def _golden(artifact: Artifact, io: IOSpec) -> Golden:
    index: GoldenIndex = _parse(GoldenIndex, artifact, "golden.json")
    tensors = artifact.tensors("golden.safetensors")
    inputs = {spec.name: tensors.get(f"input.{spec.name}", np.empty(0)) for spec in io.inputs}
    outputs = {
        variant: {spec.name: tensors.get(f"output.{variant}.{spec.name}", np.empty(0)) for spec in io.outputs}
        for variant in index.variants
    }
    count = len(inputs[io.inputs[0].name])
    if count == 0:
        raise ArtifactError("holds no golden samples", where=artifact.path("golden.safetensors"))
    _check_shapes({spec.name: (count, *spec.shape) for spec in io.inputs}, inputs, artifact)
    for arrays in outputs.values():
        _check_shapes({spec.name: (count, *spec.shape) for spec in io.outputs}, arrays, artifact)
    return Golden(inputs, outputs, index)


def _check_shapes(wanted: dict[str, tuple[int, ...]], arrays: Arrays, artifact: Artifact) -> None:
    for name, shape in wanted.items():
        if arrays[name].shape != shape:
            raise ArtifactError(f"golden tensor {name!r} does not fit io.json", where=artifact.root, expected=shape,
                                found=arrays[name].shape)


def _read_regular(path: Path, size: int) -> bytes:
    """Read a file of known size. O_NONBLOCK: a FIFO must not hang; O_NOFOLLOW: a link is not what was hashed."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror}", where=path) from error
    with os.fdopen(handle, "rb") as stream:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError("is not a regular file", where=path)
        if status.st_size != size:
            raise ArtifactError("has another size", where=path, expected=size, found=status.st_size)
        return stream.read(size + 1)

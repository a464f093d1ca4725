"""A verified bundle: everything the device needs, read once and typed.

Legend: N golden samples, C channels of one input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.budgets import Budgets, parse_budgets
from fmdeploy.errors import ArtifactError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.manifest import Kind
from fmdeploy.record import Field, Record, read_record
from fmdeploy.runtime.onnxcheck.checks import check_model, remarks
from fmdeploy.runtime.onnxcheck.interface import Declared
from fmdeploy.runtime.onnxcheck.model import Model
from fmdeploy.runtime.signature import Signature, signature_of

# Files that are read when a bundle is opened: from the very bytes that were hashed.
PARSED = ("io.json", "input_statistics.json", "golden.json", "golden.safetensors", "budgets.toml", "metrics.json",
          "tensorrt.json")


class _Lenient(Record):
    forbids_unknown = False


class VariantTolerance(_Lenient):
    """How far a variant's outputs may be from the golden ones on another machine."""

    sqnr_db: float = Field(description="Smallest signal-to-quantisation-noise ratio, in dB, over all golden samples")


class GoldenIndex(_Lenient):
    """golden.json."""

    variants: dict[str, VariantTolerance]
    samples: tuple[str, ...] = ()
    saturates_without_vnni: tuple[str, ...] = Field(
        default=(), description="Layers of int8-cpu whose 8-bit products may saturate on x86 without VNNI"
    )


class InputStatistics(_Lenient):
    """What the calibration set looked like to one input."""

    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...] = Field(description="Spread of the per-sample channel means")
    energy_mean: tuple[float, ...] = Field(default=(), description="Mean of the squares, a channel")
    energy_std: tuple[float, ...] = Field(default=(), description="Spread of the per-sample means of the squares")
    min: float | None = None
    max: float | None = None


class OutputStatistics(_Lenient):
    """What the calibration set gave at one output: root mean squares of its samples."""

    rms_mean: float = Field(ge=0)
    rms_std: float = Field(ge=0)
    rms_min: float = Field(ge=0)
    rms_max: float = Field(ge=0)


class StatisticsFile(_Lenient):
    """input_statistics.json."""

    inputs: dict[str, InputStatistics]
    outputs: dict[str, OutputStatistics] = Field(default_factory=dict)


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
    signature: Signature
    output_statistics: dict[str, OutputStatistics] = field(default_factory=dict)

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

    def declared(self, variant: str) -> Declared:
        """What the bundle says about the INT8 of one variant."""
        rows = _table(self.artifact, "metrics.json").get("variants", {})
        row = rows.get(variant, {}) if isinstance(rows, dict) else {}
        pairs = row.get("quantize_pairs") if isinstance(row, dict) else None
        nodes = _table(self.artifact, "tensorrt.json").get("required_int8", []) if variant == "int8" else []
        return Declared(int8=variant.startswith("int8"), pairs=pairs if isinstance(pairs, int) else None,
                        nodes=tuple(map(str, nodes)) if isinstance(nodes, list) else ())

    def model_bytes(self, variant: str) -> bytes:
        """Read one variant's file once; hash and check exactly the bytes that are returned.

        Raises:
            ArtifactError: The bundle has no such variant, or the file changed since it was opened.
            ModelFileError: The model is not one that may run here, see `onnxcheck`.
        """
        raw, _ = self._checked(variant)
        return raw

    def remarks(self, variant: str) -> tuple[str, ...]:
        """What is odd about one variant's file, though it may run; raises as `model_bytes` does."""
        return tuple(f"{variant}: {remark}" for remark in remarks(self._checked(variant)[1]))

    def _checked(self, variant: str) -> tuple[bytes, Model]:
        name = f"model.{variant}.onnx"
        raw = self.artifact.read(name)
        return raw, check_model(raw, self.io, where=self.artifact.path(name), declared=self.declared(variant))


def open_bundle(root: Path | str | Bundle, *, require_signature: Path | None = None) -> Bundle:
    """Open and verify a bundle.

    Args:
        root: Its folder.
        require_signature: PEM file of the public key that must have signed it; default: an unsigned one is taken too.

    Raises:
        ArtifactError: It is missing, altered, of another kind, not signed by the key, or its files contradict each
            other.
        ConfigError: budgets.toml is not valid.
    """
    if isinstance(root, Bundle):
        return root if require_signature is None else open_bundle(root.artifact.root,
                                                                  require_signature=require_signature)
    artifact = open_artifact(Path(root), Kind.BUNDLE, hold=PARSED)
    signature = signature_of(artifact, require_signature)  # before anything of it is parsed
    io = _parse(IOSpec, artifact, "io.json")
    known: StatisticsFile = _parse(StatisticsFile, artifact, "input_statistics.json")
    statistics = known.inputs
    golden = _golden(artifact, io)
    for spec in io.inputs:
        if spec.name not in statistics:
            raise ArtifactError("has no statistics of an input", where=artifact.root, expected=spec.name)
    budgets = parse_budgets(artifact.read("budgets.toml"), artifact.path("budgets.toml"))
    artifact.held.pop("golden.safetensors", None)  # it is in memory as arrays now
    return Bundle(artifact, io, golden, statistics, budgets, signature, known.outputs)


def _table(artifact: Artifact, name: str) -> dict[str, Any]:
    """A JSON object of the bundle; empty where it has no such file."""
    found = artifact.json(name) if artifact.has(name) else {}
    return found if isinstance(found, dict) else {}


def _parse(model: type[Any], artifact: Artifact, name: str) -> Any:
    raw = artifact.json(name)
    if not isinstance(raw, dict):
        raise ArtifactError("is not a JSON object", where=artifact.path(name))
    return read_record(model, raw, where=artifact.path(name))


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
    for wanted, arrays in ((io.inputs, inputs), *((io.outputs, arrays) for arrays in outputs.values())):
        for spec in wanted:
            _check_golden(spec, arrays[spec.name], count, artifact)
    return Golden(inputs, outputs, index)


def _check_golden(spec: TensorSpec, array: Array, count: int, artifact: Artifact) -> None:
    what = f"golden tensor {spec.name!r}"
    found, wanted = (str(array.dtype), array.shape), (spec.dtype, (count, *spec.shape))
    if found != wanted:
        raise ArtifactError(f"{what} does not fit io.json", where=artifact.root, expected=wanted, found=found)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ArtifactError(f"{what} holds NaN or infinity", where=artifact.root, fix="Export the bundle again")

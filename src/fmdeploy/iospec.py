"""The one description of a model's inputs and outputs.

Training, calibration, evaluation, export and runtime all use this object: what it says once holds everywhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import Any, Literal

from fmdeploy.manifest import canonical
from fmdeploy.record import Dumped, Field, Record

SHA256 = re.compile(r"[0-9a-f]{64}")


class TensorSpec(Record):
    """One input or output of a model, for a single sample: `shape` has no batch axis."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    dtype: Literal["float32", "float16", "uint8", "int64"] = "float32"
    shape: tuple[int, ...] = Field(description="Without batch; every axis is static and at least 1")
    layout: str = Field(default="", description="One letter an axis, such as CHW; empty means 'no convention'")
    value_range: tuple[float, float] | None = Field(default=None, description="Closed range of valid values")
    channels: tuple[str, ...] = Field(default=(), description="Meaning of the entries of axis 0")
    sensor: str | None = Field(default=None, description="Which sensor feeds this input")

    def _agree(self) -> None:
        if any(size < 1 for size in self.shape):
            raise ValueError(f"{self.name}: axes must be static and at least 1, found {self.shape}")
        if self.layout and len(self.layout) != len(self.shape):
            raise ValueError(f"{self.name}: layout {self.layout!r} does not name the axes of {self.shape}")
        if self.channels and (not self.shape or len(self.channels) != self.shape[0]):
            raise ValueError(f"{self.name}: {len(self.channels)} channel names for shape {self.shape}")


class IOSpec(Record):
    """All inputs and outputs, in the order of the model's arguments and results."""

    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    preprocessing: str = Field(description="Says how raw sensor data becomes these inputs; part of the digest")
    rig: dict[str, str] = Field(
        default_factory=dict,
        description="Name of a sensor → sha256 of its calibration (intrinsics, extrinsics): the model fits no other",
    )

    def _agree(self) -> None:
        names = [spec.name for spec in (*self.inputs, *self.outputs)]
        if len(set(names)) != len(names):
            raise ValueError(f"names repeat: {names}")
        if wrong := [sensor for sensor, digest in self.rig.items() if not SHA256.fullmatch(digest)]:
            raise ValueError(f"rig: {wrong[0]!r} does not name a sha256")

    def model_dump(self, *, mode: Dumped = "python", exclude: Collection[str] = ()) -> dict[str, Any]:
        """Leave an empty rig out, so that specifications from before it keep their digest."""
        return super().model_dump(mode=mode, exclude=exclude if self.rig else {*exclude, "rig"})

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: changes whenever any number here changes."""
        return hashlib.sha256(canonical(self.model_dump(mode="json"))).hexdigest()

"""Frames around a sample: samples that know them, and options that name some of those to come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol, runtime_checkable

from pydantic import AfterValidator, Field, ValidationInfo

from fmdeploy.task import Array
from fmdeploy.training.sampler import Index

FARTHEST = 8  # frames ahead that every sample of a sequence still has


@runtime_checkable
class Recorded(Protocol):
    """Samples that can show the sensors of other frames; see `tasks.bev_occupancy_samples.BevSamples`."""

    def frames(self, index: Index, offsets: Sequence[int]) -> Array:
        """Sensor planes uint8 (B, len(offsets), planes, cells, cells)."""


def _in_reach(value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
    if min(value) < 0 or max(value) > FARTHEST or len(set(value)) != len(value):
        raise ValueError(f"{info.field_name} are different frames from 0 to {FARTHEST}")
    return value


FramesAhead = Annotated[tuple[int, ...], Field(min_length=1), AfterValidator(_in_reach)]
"""An option: different numbers of frames ahead."""

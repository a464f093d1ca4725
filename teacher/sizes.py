"""The size options of a teacher, the same for every verb that makes one."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fmdeploy.config import StageConfig


class TeacherSizes(StageConfig):
    """Sizes that are not given are the task's own."""

    dim: int | None = Field(default=None, ge=1, description=(
        "width of the transformer; sizes that are not given are the task's own"))
    depth: int | None = Field(default=None, ge=1, description="blocks of the transformer")
    heads: int | None = Field(default=None, ge=1, description="attention heads")
    stem_width: int | None = Field(default=None, ge=1, description="channels at half resolution")
    width: int | None = Field(default=None, ge=1, description="channels at quarter resolution")
    activation_checkpointing: bool | None = Field(default=None, description="recompute activations to save memory")

    def sizes(self) -> dict[str, Any]:
        """The size options that were given, for `Task.teacher`."""
        given = {name: getattr(self, name) for name in TeacherSizes.model_fields}
        return {name: value for name, value in given.items() if value is not None}

"""A mixture in TOML: how often training sees what, relative to how often it happens.

    temperature = 2.0            # strata of `axes` are drawn by their share to the power 1 / temperature: 1 is natural
    axes = ["scenario", "weather"]
    max_oversampling = 4.0       # no sample is seen more than 4 times as often as naturally, none less than a quarter
    importance = false           # true: the loss undoes the oversampling (1 / rate), as if drawn naturally
    representation = "natural"   # objectives that need no labels: "natural" refuses weights, "mixture" applies them

    [weights.rare]               # a slice of the task, a class label, a key of the metadata, or `domain`
    cut-in = 3.0
    near-collision = 3.0
    [weights.weather]
    fog = 1.5
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fmdeploy.config import read_toml, validate

Weight = Annotated[float, Field(gt=0, le=1e6)]


class MixtureRecipe(BaseModel):
    """The content of a mixture file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    axes: tuple[str, ...] = Field(default=(), description="Axes whose combinations are strata for the temperature")
    temperature: float = Field(default=1.0, ge=1, le=1e6, description="1: natural shares; large: equal shares")
    weights: dict[str, dict[str, Weight]] = Field(default={}, description="Axis → value → weight")
    max_oversampling: float = Field(default=4.0, ge=1, le=1e3, description="Bound on the rate, and its inverse below")
    importance: bool = Field(default=False, description="Weigh the loss by 1 / rate")
    representation: Literal["natural", "mixture"] = Field(default="natural", description="Objectives without labels")

    @property
    def is_natural(self) -> bool:
        """Whether every sample is seen equally often."""
        flat = all(weight == 1 for values in self.weights.values() for weight in values.values())
        return flat and (self.temperature == 1 or not self.axes)

    @property
    def is_bounded(self) -> bool:
        """Whether `max_oversampling` is to hold: some rate is asked for, or the bound itself is."""
        return not self.is_natural or "max_oversampling" in self.model_fields_set

    def used_axes(self) -> tuple[str, ...]:
        """All axes that are named, each once."""
        return tuple(dict.fromkeys((*self.axes, *self.weights)))

    def to_json(self) -> dict[str, Any]:
        """For a manifest."""
        return self.model_dump(mode="json")


def read_recipe(path: Path) -> MixtureRecipe:
    """Read a mixture file.

    Raises:
        ConfigError: it is not TOML, or holds unknown keys or values out of range.
    """
    return validate(MixtureRecipe, read_toml(path), where=path)

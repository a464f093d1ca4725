"""Options of `teacher adapt`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fmdeploy.config import InputPath, OutputPath, RunOnly
from fmdeploy.data.trained_on import TrainedOnConfig
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.mixture.options import MixtureConfig

Method = Literal["lora", "adapter", "prompt", "bias-norm", "head"]
Also = Literal["bias-norm", "head"]
DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 1, "alpha": 2.0, "convolutions": True, "targets": ()},
    "adapter": {"width": 8},
    "prompt": {"prompts": 8, "deep": True},
    "bias-norm": {},
    "head": {"targets": ()},
}


class AdaptConfig(TrainedOnConfig, MixtureConfig, TrainingConfig):
    """How the teacher is adapted. Options that are not given have the defaults of their method."""

    teacher: InputPath = Field(description="TEACHER that stays as it is")
    data: InputPath = Field(description="DATASET of the new domain")
    out: OutputPath = Field(description="Where the ADAPTER is written")
    method: Method = Field(default="lora", description="what is added or trained; docs/adaptation.md compares them")
    also: tuple[Also, ...] = Field(default=(), description="train these too; may be repeated")
    rank: int | None = Field(default=None, ge=1, description="lora: rank of an update [default: 1]")
    alpha: float | None = Field(default=None, gt=0, description="lora: updates are scaled by alpha / rank [default: 2]")
    convolutions: bool | None = Field(default=None, description="lora: adapt convolutions too [default: yes]")
    targets: tuple[str, ...] = Field(default=(), description=(
        "lora, head: modules whose name begins so; may be repeated [default: all that the method can train]"))
    width: int | None = Field(default=None, ge=1, description="adapter: width of a bottleneck [default: 8]")
    prompts: int | None = Field(default=None, ge=1, description="prompt: learned tokens [default: 8]")
    deep: bool | None = Field(default=None, description="prompt: others before every block [default: yes]")
    labels: float = Field(default=1.0, gt=0, le=1, description="share of the train simulations whose labels are used")
    label_seed: int = Field(default=0, ge=0, description="which simulations those are")
    activation_checkpointing: Annotated[bool | None, RunOnly()] = Field(default=None, description=(
        "recompute activations to save memory"))
    source_data: InputPath | None = Field(default=None, description="DATASET of the old domain to measure the fall on")

    @model_validator(mode="after")
    def _suit_each_other(self) -> AdaptConfig:
        mine = DEFAULTS[self.method]
        others = {key for options in DEFAULTS.values() for key in options} - set(mine)
        if strange := [key for key in sorted(others) if getattr(self, key) not in (None, ())]:
            raise ValueError(f"{strange[0]} is no option of the method {self.method}")
        if self.method in self.also or len(set(self.also)) != len(self.also):
            raise ValueError(f"{', '.join((self.method, *self.also))} repeats")
        return self

    def options(self) -> dict[str, Any]:
        """The options of the method, defaults filled in."""
        given = {key: getattr(self, key) for key in DEFAULTS[self.method]}
        return {key: DEFAULTS[self.method][key] if value is None else value for key, value in given.items()}

    def resolved(self) -> dict[str, Any]:
        """With the method's own options spelled out."""
        spelled = {key: list(value) if isinstance(value, tuple) else value for key, value in self.options().items()}
        return {**super().resolved(), **spelled}

"""Options of `distill`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fmdeploy.config import InputPath, OutputPath
from fmdeploy.data.trained_on import TrainedOnConfig
from fmdeploy.distill.losses.registry import LOSSES, Weights, weights_of
from fmdeploy.errors import ConfigError
from fmdeploy.provenance import source_digest
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.mixture.options import MixtureConfig

SIZES = ("stem_width", "width", "dim", "depth")
AUGMENTATIONS = ("flip", "translate", "crop")


class DistillConfig(TrainedOnConfig, MixtureConfig, TrainingConfig):
    """How the student is trained. Without a teacher it learns from labels alone."""

    data: InputPath = Field(description="DATASET")
    out: OutputPath = Field(description="Where the STUDENT is written")
    teacher: tuple[InputPath, ...] = Field(default=(), description=(
        "TEACHER, or TEACHER=WEIGHT; repeat it for several; none given: labels only"))
    features: tuple[InputPath, ...] = Field(default=(), description=(
        "FEATURES of the teachers: one with all of them, or one each in order; none given: they run live"))
    build_cache: OutputPath | None = Field(default=None, description="write the FEATURES there first, then use them")
    init: InputPath | None = Field(default=None, description="STUDENT to start from, such as one without heads")
    task: str = Field(default="bev-occupancy", description="built-in task, or module:Class")
    student: str = Field(default="cnn", description="cnn, vit, depthwise, hf:FOLDER, timm:NAME or module:callable")
    stem_width: int | None = Field(default=None, ge=1, description=(
        "student's channels at half resolution; sizes that are not given are the student's own"))
    width: int | None = Field(default=None, ge=1, description=(
        "student's channels: of the cnn and depthwise at quarter, of the vit at half resolution"))
    dim: int | None = Field(default=None, ge=1, description="student's transformer width")
    depth: int | None = Field(default=None, ge=1, description="student's transformer blocks")
    labels: float = Field(default=1.0, ge=0, le=1, description="share of the train simulations whose labels are used")
    label_seed: int = Field(default=0, ge=0, description="which simulations those are")
    labelled_share: float = Field(default=0.25, gt=0, le=1, description=(
        "with a teacher: share of each batch that is drawn from labelled samples and compared with labels"))
    loss: tuple[str, ...] = Field(default=("labels=0.5", "logits=2", "features=0.2"), description=(
        f"NAME or NAME=WEIGHT, repeated: {', '.join(LOSSES)}"))
    set: tuple[str, ...] = Field(default=(), description=(
        "option of a loss or augmentation, as NAME.KEY=VALUE; may be repeated"))
    weighting: Literal["fixed", "learned"] = Field(default="fixed", description=(
        "learned: one uncertainty a loss is trained, starting from the given weights"))
    teacher_logits: Literal["mean", "each"] = Field(default="mean", description=(
        "several teachers: the mean of their probabilities, or a loss against each"))
    layers: tuple[str, ...] = Field(default=(), description=(
        "TEACHER_LAYER:STUDENT_LAYER to compare, may be repeated; none given: the task's choice"))
    augment: tuple[str, ...] = Field(default=("flip",), description=(
        "flip (where --mirror), translate, crop: moves inputs, labels and the teacher's answers alike"))
    progressive: float = Field(default=0.0, ge=0, lt=1, description="share of the steps at reduced resolution, first")
    progressive_factor: int = Field(default=2, ge=2, description="by which rows and columns are reduced then")
    steps: int = Field(default=550, ge=1, description="optimiser steps")
    lr: float = Field(default=3e-3, gt=0, description="peak learning rate")
    channels_last: bool = Field(default=True, description="lay kernels out channels-last: a tenth faster for the cnn")

    @field_validator("teacher", "features", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return tuple(() if value is None else (value,) if isinstance(value, str | Path) else value)

    @field_validator("augment", mode="after")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [name for text in value for name in text.split(",") if name]
        if unknown := [name for name in names if name not in AUGMENTATIONS]:
            raise ValueError(f"no such augmentation: {unknown[0]} (known: {', '.join(AUGMENTATIONS)})")
        return tuple(name for name in AUGMENTATIONS if name in names)

    @model_validator(mode="after")
    def _fit_together(self) -> DistillConfig:
        if not self.teacher and (self.features or self.build_cache):
            raise ValueError("features need the teacher they came from: give --teacher too")
        if self.features and self.build_cache:
            raise ValueError("give either features or build_cache, not both")
        if len(self.features) not in (0, 1, len(self.teacher)):
            raise ValueError("give one features for all teachers, or one for each")
        if not self.teacher and self.labels == 0:
            raise ValueError("without a teacher there must be labels")
        if self.replay and (self.features or self.build_cache):
            raise ValueError("a cache holds one dataset: with --replay the teacher runs live")
        if self.init is not None and self.sizes():
            raise ValueError(f"sizes are those of --init: leave out {', '.join(self.sizes())}")
        try:
            weights = self.weights()
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if self.teacher and not (weights.outputs or weights.maps or (weights.labels and self.labels)):
            raise ValueError("no part of the loss has weight")
        return self

    def weights(self) -> Weights:
        """Of the losses; without a teacher the labels count 1 and nothing else is there.

        Raises:
            ConfigError: unknown name or unusable weight.
        """
        found = weights_of(self.loss)
        return found if self.teacher else Weights(1.0, {}, {})

    def teachers(self) -> list[tuple[Path, float]]:
        """Folder and share of each teacher; the shares sum to 1. A folder that exists may hold `=` in its name.

        Raises:
            ConfigError: a weight is no number above 0.
        """
        found = [_path_and_weight(path) for path in self.teacher]
        total = sum(weight for _, weight in found)
        return [(path, weight / total) for path, weight in found]

    def resolved(self) -> dict[str, Any]:
        """With hashes of the user's own task and student in place of trust in their names."""
        found = {**super().resolved(), "task_source": source_digest(self.task)}
        if len(self.teacher) > 1:
            found["teacher_shares"] = [share for _, share in self.teachers()]
        if self.student.startswith("hf:"):  # a folder is where something lies, not what it is
            return {**found, "student": f"hf:{source_digest(self.student)}", "student_source": None}
        return {**found, "student_source": source_digest(self.student)}

    def sizes(self) -> dict[str, Any]:
        """The size options that were given, for `Task.student`."""
        given = {name: getattr(self, name) for name in SIZES}
        return {name: value for name, value in given.items() if value is not None}


def _path_and_weight(path: Path) -> tuple[Path, float]:
    text, equal, weight = str(path).rpartition("=")
    if not equal or path.exists():
        return path, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError("has no usable weight", where=f"teacher {path}", expected="TEACHER=WEIGHT, above 0")
    return Path(text), value

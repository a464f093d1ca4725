"""Options of `distill`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from fmdeploy.config import InputPath, OutputPath
from fmdeploy.provenance import source_digest
from fmdeploy.training.config import TrainingConfig

SIZES = ("stem_width", "width", "dim", "depth")


class DistillConfig(TrainingConfig):
    """How the student is trained. Without a teacher it learns from labels alone."""

    data: InputPath = Field(description="DATASET")
    out: OutputPath = Field(description="Where the STUDENT is written")
    teacher: InputPath | None = Field(default=None, description="TEACHER; none given: labels only")
    features: InputPath | None = Field(default=None, description="FEATURES of that teacher; none given: it runs live")
    build_cache: OutputPath | None = Field(default=None, description="Write the FEATURES there first, then use them")
    task: str = Field(default="bev-occupancy", description="built-in task, or module:Class")
    student: str = Field(default="cnn", description="cnn, vit, depthwise, hf:FOLDER, timm:NAME or module:callable")
    stem_width: int | None = Field(default=None, ge=1, description="student's channels at half resolution")
    width: int | None = Field(default=None, ge=1, description="student's channels")
    dim: int | None = Field(default=None, ge=1, description="student's transformer width")
    depth: int | None = Field(default=None, ge=1, description="student's transformer blocks")
    labels: float = Field(default=1.0, ge=0, le=1, description="share of the train simulations whose labels are used")
    label_seed: int = Field(default=0, ge=0, description="which simulations those are")
    labelled_share: float = Field(default=0.25, gt=0, le=1, description="share of a batch drawn from labelled samples")
    alpha_labels: float = Field(default=0.5, ge=0, description="weight of the loss against labels")
    alpha_logits: float = Field(default=2.0, ge=0, description="weight of the loss against the teacher's logits")
    alpha_features: float = Field(default=0.2, ge=0, description="weight of the loss against the teacher's features")
    steps: int = Field(default=550, ge=1, description="optimiser steps")
    lr: float = Field(default=3e-3, gt=0, description="peak learning rate")
    channels_last: bool = Field(default=True, description="lay kernels out channels-last: a tenth faster for the cnn")

    @model_validator(mode="after")
    def _fit_together(self) -> DistillConfig:
        if self.teacher is None and (self.features or self.build_cache):
            raise ValueError("features need the teacher they came from: give --teacher too")
        if self.features and self.build_cache:
            raise ValueError("give either features or build_cache, not both")
        if self.teacher is None and self.labels == 0:
            raise ValueError("without a teacher there must be labels")
        if self.teacher is not None and not (
            self.alpha_logits or self.alpha_features or (self.alpha_labels and self.labels)
        ):
            raise ValueError("every part of the loss has weight 0")
        return self

    def resolved(self) -> dict[str, Any]:
        """With hashes of the user's own task and student in place of trust in their names."""
        found = {**super().resolved(), "task_source": source_digest(self.task)}
        if self.student.startswith("hf:"):  # a folder is where something lies, not what it is
            return {**found, "student": f"hf:{source_digest(self.student)}", "student_source": None}
        return {**found, "student_source": source_digest(self.student)}

    def sizes(self) -> dict[str, Any]:
        """The size options that were given, for `Task.student`."""
        given = {name: getattr(self, name) for name in SIZES}
        return {name: value for name, value in given.items() if value is not None}

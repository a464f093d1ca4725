"""Options of `quantize`."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import Field, model_validator

from fmdeploy.config import InputPath, OutputPath
from fmdeploy.data.trained_on import TrainedOnConfig
from fmdeploy.quantize.calibrators import Calibrator
from fmdeploy.training.config import Precision, TrainingConfig


class QuantizeConfig(TrainedOnConfig, TrainingConfig):
    """How the student is quantised. The training options matter for `qat` and `qad` only."""

    student: InputPath = Field(description="STUDENT")
    data: InputPath = Field(description="DATASET that the student was trained on")
    out: OutputPath = Field(description="Where the QUANTIZED is written")
    mode: Literal["ptq", "qat", "qad"] = Field("ptq", description=(
        "calibrate only; or also train on the grid: imitating the float student, or learning from its teacher"))
    teacher: InputPath | None = Field(None, description="qad: TEACHER")
    features: InputPath | None = Field(None, description="qad: FEATURES of that teacher; none given: it runs live")
    calibrator: Calibrator = Field("mse", description="how activation ranges are chosen; auto: by measured error")
    calibration_samples: int = Field(256, ge=1, description="samples that show the ranges")
    calibration_split: str = Field("train", description="must be 'train'; the others are for judging")
    smooth: float | None = Field(None, ge=0, le=1, description="strength of SmoothQuant's exact re-scaling")
    clip_weights: bool = Field(False, description="narrow weight ranges where that lowers the error")
    placement: InputPath | None = Field(None, description="placement.toml to obey")
    keep_float: tuple[str, ...] = Field((), description="modules to leave in float, such as stem.0.0")
    quantise_heads: bool = Field(False, description="quantise the last layers too (their outputs stay float)")
    sensitivity: bool = Field(False, description="measure what every layer costs, one by one")
    max_drop: float | None = Field(None, ge=0, lt=1, description=(
        "largest relative drop of the metric on the validation split; keeps the cheapest layers in float for it"))
    device: str = Field("orin-nano-super", description="whose predicted latency says what is cheap")
    validation_samples: int = Field(512, ge=1, description="samples of the validation split that choices are made on")
    alpha_student: float = Field(1.0, ge=0, description="qat: weight of imitating the float student")
    alpha_labels: float = Field(0.0, ge=0, description="qat: weight of the labels of the whole training split")
    learn_scales: bool = Field(False, description="qat, qad: train the ranges too")
    validate_every: int = Field(25, ge=1, description="qat, qad: steps between looks at the validation split")
    patience: int = Field(4, ge=0, description="qat, qad: looks without a gain that end the training; 0 never does")
    steps: int = Field(200, ge=1, description="qat, qad: optimiser steps")
    lr: float = Field(5e-4, gt=0, description="qat, qad: peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="qat, qad: AdamW decay of matrices and kernels")
    precision: Precision = Field("fp32", description="qat, qad: arithmetic of the fake-quantised network")

    @model_validator(mode="after")
    def _fit_together(self) -> QuantizeConfig:
        if self.mode == "qad" and self.teacher is None:
            raise ValueError("qad needs the teacher that made the student: give --teacher, and --features if cached")
        if self.mode != "qad" and (self.teacher or self.features or self.teacher_data):
            raise ValueError("a teacher is for --mode qad")
        return self

    def resolved(self) -> dict[str, Any]:
        """With the content of the placement file in place of its name."""
        file = self.placement
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file is not None and file.is_file() else None
        return {**super().resolved(), "placement_digest": digest}

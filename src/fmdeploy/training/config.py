"""Options that every training stage shares."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fmdeploy.config import RunOnly, StageConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Schedule = Literal["cosine", "linear", "constant"]
Sharding = Literal["none", "fsdp"]


class StepConfig(StageConfig):
    """What the work and the memory of a run hang on, beside its networks."""

    steps: int = Field(default=800, ge=1, description="optimiser steps")
    batch: int = Field(default=16, ge=1, description="samples a step, over all processes and accumulated parts")
    accumulation: int = Field(default=1, ge=1, description=(
        "parts a step's batch is cut into, to save memory; Dice and BatchNorm then see one part at a time"))
    ema: float = Field(default=0.0, ge=0, lt=1, description="decay of the averaged weights; 0 keeps the last ones")
    precision: Precision = Field(default="auto", description=(
        "arithmetic; auto: what this device is fast at; fp16 needs a GPU"))
    sharding: Annotated[Sharding, RunOnly()] = Field(default="none", description=(
        "fsdp: cut parameters, gradients and optimiser state over the processes of a torchrun"))

    @model_validator(mode="after")
    def _parts_are_equal(self) -> StepConfig:
        if self.batch % self.accumulation:
            raise ValueError(f"batch {self.batch} is not a multiple of accumulation {self.accumulation}")
        return self


class TrainingConfig(StepConfig):
    """Optimiser, schedule and batch of one training run."""

    lr: float = Field(default=2e-3, gt=0, description="peak learning rate")
    schedule: Schedule = Field(default="cosine", description="how the rate falls to 1 % of its peak after the warm-up")
    backbone_lr: float = Field(default=1.0, gt=0, description=(
        "rate of modules called backbone, as a multiple of lr; fine-tuning wants less than 1"))
    warmup: float = Field(default=0.08, ge=0, le=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(default=0.02, ge=0, description="AdamW decay of matrices and kernels")
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    mirror: bool = Field(default=True, description="mirror half of the samples, where the task has a mirror image")
    channels_last: bool = Field(default=False, description="lay kernels out channels-last, which some devices prefer")
    divergence: float = Field(default=10.0, ge=0, description=(
        "stop when the loss stays above this multiple of its running median; 0: only when it is not finite"))
    seed: int = Field(default=0, ge=0, lt=2**31, description="of initial weights, order of samples and augmentation")
    checkpoint_every: Annotated[int, RunOnly()] = Field(default=100, ge=1, description="steps between checkpoints")

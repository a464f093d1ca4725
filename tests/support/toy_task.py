"""A task for the toy bundle: its labels are what the FP32 model says, with some noise, so that scores are known to differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmdeploy.artifact import Artifact
from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.evaluate.metrics import ECE, Accuracy, OccupancyIoU
from fmdeploy.iospec import IOSpec
from fmdeploy.task import Metric, Task
from support.bundles import fp32_model, inputs, io_spec, run_model

if TYPE_CHECKING:
    from torch import Tensor, nn


class ToyTask(Task):
    """Occupancy on a 16 x 16 grid."""

    name = "toy"

    @property
    def io(self) -> IOSpec:
        return io_spec()

    def metrics(self) -> tuple[Metric, ...]:
        return OccupancyIoU(), ECE(), Accuracy("scene_accuracy")

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        raise AssertionError("the device does not train")

    def distillation_loss(self, outputs: dict[str, Tensor], teacher_outputs: dict[str, Tensor]) -> Tensor:
        raise AssertionError("the device does not train")

    def teacher(self, options: Mapping[str, Any]) -> nn.Module:
        raise AssertionError("the device does not train")

    def student(self, name: str, options: Mapping[str, Any]) -> nn.Module:
        raise AssertionError("the device does not train")


def make_dataset(out: Path, *, count: int = 96, seed: int = 3) -> Artifact:
    """`count` test samples in groups of four; slices weather (clear, fog), scenario, and rare (a few)."""
    batch = inputs(count, seed=seed)
    outputs = run_model(fp32_model(), batch)
    rng = np.random.default_rng(seed)
    flipped = rng.random(outputs["bev"].shape) < 0.05
    numbers = np.arange(count)
    arrays = {
        **batch,
        "bev": ((outputs["bev"] > 0) ^ flipped).astype(np.uint8),
        "scene": outputs["scene"].argmax(axis=1).astype(np.int64),
        "slice_weather": np.where(numbers // 4 % 2, "fog", "clear"),
        "slice_scenario": np.where(numbers // 8 % 2, "merge", "exit"),
        "slice_rare": numbers < 6,
    }
    return write_arrays(out, arrays, {"test": numbers, "train": numbers[:0]}, groups=numbers // 4, name=f"toy{seed}")

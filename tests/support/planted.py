"""A network whose float function hides what INT8 will do to one of its layers, with a task that notices."""

# B batch, C channels, H W rows and columns, N samples

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmdeploy.models.outputs import predictor
from fmdeploy.quantize.calibrate import CalibrationSet
from fmdeploy.task import Array, Arrays
from fmdeploy.tasks.image_classification import ImageClassification

SIDE, CLASSES, DEAD = 12, 4, -1
CONVS = ("first", "second", "third", "fourth")


class Chain(nn.Module):
    """Four convolutions with ReLU, a mean, a linear head. The last channel of every tensor is always zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.second, self.third, self.fourth = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(8, CLASSES)
        for name in CONVS:
            conv = self.get_submodule(name)
            with torch.no_grad():
                conv.get_parameter("weight").mul_(2.0)
                conv.get_parameter("weight")[DEAD] = 0.0
                conv.get_parameter("bias")[DEAD] = -1.0

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, classes)."""
        for name in CONVS:
            image_BCHW = torch.relu(self.get_submodule(name)(image_BCHW))
        logits_BC: Tensor = self.head(image_BCHW.mean((2, 3)))
        return logits_BC


def plant(net: nn.Module, layer: str, size: float = 300.0) -> None:
    """Give `layer` huge weights for an input that is always zero: float computes the same, one scale cannot hold both."""
    with torch.no_grad():
        net.get_submodule(layer).get_parameter("weight")[:, DEAD] = size


class Planted(ImageClassification):
    """Images of noise with an empty second channel, labelled with what the float network says."""

    image_shape, num_classes = (2, SIDE, SIDE), CLASSES

    def teacher(self, options: Mapping[str, Any]) -> nn.Module:
        """Not needed."""
        raise NotImplementedError

    def student(self, name: str, options: Mapping[str, Any]) -> nn.Module:
        """The chain."""
        return Chain()


@dataclass(frozen=True)
class Labelled:
    """Samples in memory, four a group; see `task.Samples`."""

    images: Array
    labels: Array

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"s/{k:03d}" for k in range(len(self.images)))

    @property
    def groups(self) -> Array:
        return np.arange(len(self.images)) // 4

    @property
    def slices(self) -> Mapping[str, Array]:
        return {}

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Array) -> tuple[Arrays, Arrays]:
        return {"image": self.images[index]}, {"label": self.labels[index]}


def labelled(net: nn.Module, count: int = 96) -> Labelled:
    """The `count` images, of twice as many, that the float network is surest of, with its answers."""
    images = _images(2 * count, seed=1)
    logits = predictor(net, Planted().io)({"image": images})["logits"]
    logits = logits - logits.mean(0)
    net.get_submodule("head").get_parameter("bias").data -= torch.from_numpy(
        predictor(net, Planted().io)({"image": images})["logits"].mean(0))
    ordered = np.sort(logits, axis=1)
    surest = np.sort(np.argsort(ordered[:, -2] - ordered[:, -1])[:count])
    return Labelled(images[surest], logits[surest].argmax(1))


def calibration_set() -> CalibrationSet:
    """Other images of the same kind."""
    return CalibrationSet(tuple(f"c/{k:02d}" for k in range(8)), {"image": _images(8, seed=2)}, "0" * 64, 0)


def _images(count: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    bars = rng.random((count, 1, 1, SIDE)) * rng.random((count, 1, SIDE, 1))
    seen = (bars + 0.2 * rng.random((count, 1, SIDE, SIDE))).clip(0, 1).astype(np.float32)
    return np.concatenate([seen, np.zeros_like(seen)], axis=1)

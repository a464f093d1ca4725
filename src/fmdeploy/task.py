"""What a user brings: data, networks, losses and metrics of one task.

A task is a class; `io`, `metrics`, the two losses and the networks must be given (`tasks.ImageClassification` gives all
but the networks). This module and the methods
that the device calls (`samples`, `metrics`) are free of torch; the others import it when they run.
"""

# B batch, N samples, K sufficient statistics, C channels, H rows, W columns

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fmdeploy.arrays import Array, Arrays
from fmdeploy.errors import ConfigError
from fmdeploy.iospec import IOSpec

if TYPE_CHECKING:
    from numpy.random import Generator
    from torch import Tensor, nn

    from fmdeploy.data.format import Dataset

__all__ = ["Array", "Arrays", "Geometry", "Metric", "Samples", "Task", "load_task"]
ValueT = TypeVar("ValueT")

BUILT_IN = {
    "bev-occupancy": "fmdeploy.tasks.bev_occupancy:BevOccupancy",
    "image-classification": "fmdeploy.tasks.image_classification:ImageClassification",
}


class Samples(Protocol):
    """Samples of one split, addressed by number."""

    @property
    def ids(self) -> Sequence[str]:
        """Stable name of each sample, `<sequence>/<frame>`."""

    @property
    def groups(self) -> Array:
        """(N,) int64: samples with equal numbers are not independent (one simulation, one drive)."""

    @property
    def slices(self) -> Mapping[str, Array]:
        """Name of a slicing → (N,) labels, such as scenario, weather, rare."""

    def __len__(self) -> int: ...

    def batch(self, index: Array) -> tuple[Arrays, Arrays]:
        """Inputs and targets of the samples `index` (B,), without augmentation; equal calls give equal bytes."""


class Metric(Protocol):
    """A number that is a function of sums over samples, so that any resampling is a weighted sum."""

    name: str
    higher_is_better: bool

    def statistics(self, outputs: Arrays, targets: Arrays) -> Array:
        """(B, K) float64 sufficient statistics of each sample."""

    def value(self, total: Array) -> Array:
        """(..., K) summed statistics → (...) values; NaN where nothing was counted."""


@dataclass(frozen=True)
class Geometry:
    """How the maps of a batch are moved, alike for inputs, labels and features of any resolution.

    Attributes:
        flip: (B,) bool, array or tensor: mirrored left and right, after everything else.
        box_B4: (B, 4) float64: top, left, height and width of the part that is looked at, as shares of the map's
            sides; outside, the border goes on. None: the whole map.
    """

    flip: Any
    box_B4: Array | None = None


class Task(ABC):
    """Base class of all tasks."""

    name: str
    teacher_layer: str = ""
    student_layer: str = ""
    panel_legend: str = ""
    frames: int = 1
    """Moments of the past in one sample's inputs."""
    weighs_samples: bool = False
    """Whether `loss` weighs samples by `targets["sample_weight"]` (B,), float32, where it is there."""

    @property
    @abstractmethod
    def io(self) -> IOSpec:
        """Inputs and outputs of every network of this task."""

    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """The first is the primary one: budgets and retention speak of it."""

    def events(self) -> tuple[Metric, ...]:
        """Events whose predicted frequency is held against the observed one (evaluate/frequency.py). Default: none."""
        return ()

    @abstractmethod
    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        """Scalar loss against labels; sums over the batch must go over all ranks (see training.distributed)."""

    @abstractmethod
    def teacher(self, options: Mapping[str, Any]) -> nn.Module:
        """A fresh teacher. `options` are the size fields of the teacher's configuration."""

    @abstractmethod
    def student(self, name: str, options: Mapping[str, Any]) -> nn.Module:
        """A fresh student called `name`."""

    @abstractmethod
    def distillation_loss(self, outputs: dict[str, Tensor], teacher_outputs: dict[str, Tensor]) -> Tensor:
        """Scalar loss against the teacher's logits: exactly zero where the two are equal."""

    def transform(self, values: dict[str, ValueT], geometry: Geometry) -> dict[str, ValueT]:
        """Move every map among inputs, targets, dense outputs or features (arrays or tensors) as `geometry` says.

        Default: nothing moves. `training.geometry.moved` does it for maps (B, C, H, W).
        """
        return values

    def flip(self, values: dict[str, ValueT], mask: ValueT) -> dict[str, ValueT]:
        """Mirror the samples where `mask` (B,) is true: `transform` with that alone."""
        return self.transform(values, Geometry(mask))

    def exclusive(self) -> frozenset[str]:
        """Outputs whose channels exclude each other (softmax); the others answer yes or no in each element (sigmoid).

        Default: those of layout `C`.
        """
        return frozenset(spec.name for spec in self.io.outputs if spec.layout == "C")

    def samples(self, data: Dataset, split: str) -> Samples:
        """Samples of one split. Default: every frame, arrays named as in `io` are inputs, the others targets."""
        from fmdeploy.data.samples import ArraySamples

        return ArraySamples.of(data, split, [spec.name for spec in self.io.inputs])

    def baselines(self) -> Mapping[str, Callable[[Arrays], Arrays]]:
        """Trivial predictions that a network must beat: name → function from inputs to outputs. Default: none."""
        return {}

    def corruptions(self) -> Mapping[str, Mapping[str, Callable[[Arrays, Generator], Arrays]]]:
        """Faults that only the task can make from its inputs, for `evaluate`: name → level → function. Default: none.

        A function takes one frame's inputs (no batch axis) and random numbers, and returns new arrays.
        """
        return {}

    def panel(self, values: Arrays) -> Array:
        """One picture (H, W, 3) uint8 of a single sample's inputs, outputs or targets, for the report."""
        from fmdeploy.data.samples import first_image

        return first_image(values)


def load_task(name: str) -> Task:
    """The built-in task `name`, or the user's own as `package.module:Class`.

    Raises:
        ConfigError: no such task, or it is not a `Task`.
    """
    target = BUILT_IN.get(name, name)
    module, colon, attribute = target.partition(":")
    if not colon:
        raise ConfigError("no such task", where=f"task {name!r}", expected=f"{', '.join(BUILT_IN)} or module:Class")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if target != name:
            raise
        raise ConfigError(f"cannot be loaded: {error}", where=f"task {name!r}",
                          fix="Is the module on PYTHONPATH?") from error
    if not (isinstance(found, type) and issubclass(found, Task)):  # names come from artifacts too: never call others
        raise ConfigError("is not a subclass of fmdeploy.task.Task", where=f"task {name!r}", found=repr(found)[:60])
    return found()

"""Planted features: a task whose inputs are the features themselves, so that the truth of every rung is known.

Legend: N samples, P pooled features, D channels of a map of 2 x 2 places, 4 x 4 cells, C = 4 classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fmdeploy.arrays import Array, Arrays
from fmdeploy.data.samples import ArraySamples
from fmdeploy.evaluate.metrics import IoU
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.task import Metric, Task
from fmdeploy.teacher.probe.base import Bench, FeatureMaps, Subject, View
from fmdeploy.teacher.probe.view import SplitChoice

CLASSES, SIDE, CELLS = 4, 2, 4
SCENARIOS = ("exit", "highway", "merge", "roundabout")
CHANNELS = ("t", "+0.4s", "drivable")


class PlantedTask(Task):
    """Inputs `pooled` (P) and `map` (D, 2, 2); outputs `bev` (3, 4, 4) and `scene` (4)."""

    name = "planted"

    def __init__(self, splits: Mapping[str, ArraySamples]) -> None:
        self.splits = splits

    @property
    def io(self) -> IOSpec:
        return IOSpec(
            inputs=(TensorSpec(name="pooled", shape=(1,)), TensorSpec(name="map", shape=(1, SIDE, SIDE))),
            outputs=(TensorSpec(name="bev", shape=(3, CELLS, CELLS), channels=CHANNELS),
                     TensorSpec(name="scene", shape=(CLASSES,))),
            preprocessing="none",
        )

    def metrics(self) -> tuple[Metric, ...]:
        return (IoU("iou", channels=(0,)),)

    def samples(self, data: Any, split: str) -> ArraySamples:
        return self.splits[split]

    def loss(self, outputs: Any, targets: Any) -> Any:
        raise AssertionError("nothing is trained here")

    def distillation_loss(self, outputs: Any, teacher_outputs: Any) -> Any:
        raise AssertionError("nothing is trained here")

    def teacher(self, options: Any) -> Any:
        raise AssertionError("nothing is built here")

    def student(self, name: str, options: Any) -> Any:
        raise AssertionError("nothing is built here")


@dataclass
class Splits:
    """As much of a dataset as a view reads."""

    splits: dict[str, tuple[str, ...]]
    digest: str = "d" * 64


@dataclass
class Planted:
    """Samples of all splits: `frames` a recording, two recordings (egos) a simulation, one scenario a simulation.

    Attributes:
        scene: Class int64 (N,) by split.
        bev: Labels uint8 (N, 3, 4, 4) by split.
        place: Simulation (N,) by split.
        ids: `<recording>/<frame>` by split.
        scenario: Label (N,) by split.
    """

    counts: Mapping[str, int] = field(default_factory=lambda: {"train": 240, "val": 80, "test": 160})
    frames: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.scene, self.bev, self.place, self.ids, self.scenario = {}, {}, {}, {}, {}
        for number, (split, count) in enumerate(self.counts.items()):
            recording = np.arange(count) // self.frames
            self.place[split] = recording // 2 + 1000 * number
            self.scenario[split] = np.array(SCENARIOS)[recording // 2 % len(SCENARIOS)]
            self.ids[split] = tuple(f"{split}{r}/{10 * (k % self.frames)}" for k, r in enumerate(recording))
            self.scene[split] = rng.integers(0, CLASSES, count)
            self.bev[split] = (rng.random((count, 3, CELLS, CELLS)) < 0.3).astype(np.uint8)

    def bench(self, make: Any, random: Any = None) -> Bench:
        """A bench whose features are `make(split)` → (pooled (N, P), map (N, D, 2, 2)), either None for noise."""
        return Bench(self.view(make), self.view(random) if random is not None else None)

    def view(self, make: Any) -> View:
        """One network's view."""
        rng = np.random.default_rng(1)
        samples = {split: self._samples(split, make(split), rng) for split in self.counts}
        task = PlantedTask(samples)
        data: Any = Splits({split: ids for split, ids in self.ids.items() if ids})
        return View(Subject("planted", task, features=_as_features), SplitChoice(task, data, {}))

    def _samples(self, split: str, made: tuple[Array | None, Array | None], rng: np.random.Generator) -> ArraySamples:
        (pooled, maps), count = made, self.counts[split]
        pooled = rng.normal(size=(count, 6)) if pooled is None else pooled
        maps = rng.normal(size=(count, 6, SIDE, SIDE)) if maps is None else maps
        inputs = {"pooled": pooled.astype(np.float32), "map": maps.astype(np.float32)}
        return ArraySamples(self.ids[split], np.asarray(self.place[split], np.int64), inputs,
                            {"bev": self.bev[split], "scene": self.scene[split]}, {"scenario": self.scenario[split]})


def _as_features(inputs: Arrays) -> FeatureMaps:
    return FeatureMaps(torch.from_numpy(inputs["pooled"]), torch.from_numpy(inputs["map"]))


def one_hot(numbers: Array, count: int) -> Array:
    """(N,) → float64 (N, count)."""
    return np.asarray(np.eye(count)[np.asarray(numbers)])


def places_of(bev_NCHW: Array) -> Array:
    """Labels (N, C, 4, 4) as a map (N, C * 4, 2, 2): what is in each place's cells, in plain view."""
    n, c = bev_NCHW.shape[:2]
    cells = bev_NCHW.reshape(n, c, SIDE, 2, SIDE, 2).transpose(0, 1, 3, 5, 2, 4)
    return np.asarray(cells.reshape(n, -1, SIDE, SIDE), np.float64)

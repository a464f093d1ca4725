"""Cheap rungs on the way: how the representation grows while a backbone is trained.

The samples are few and fixed, and all of train and val: half of the val simulations choose hyper-parameters, the other
half judge. Test is not looked at while anything can still be chosen. Points lie beside the checkpoints until the end; a
run that was killed computes those after its last checkpoint again, to the same numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmdeploy.arrays import Array
from fmdeploy.data.format import Dataset
from fmdeploy.draft import Draft
from fmdeploy.task import Samples, Task
from fmdeploy.teacher.probe.base import Bench, Subject, View
from fmdeploy.teacher.probe.features import features_of
from fmdeploy.teacher.probe.ladder import measured
from fmdeploy.teacher.probe.registry import rungs_of
from fmdeploy.teacher.probe.view import NotMeasuredError, SplitChoice
from fmdeploy.training.distributed import world

NAME = "probes.json"
RUNGS = ("linear", "knn", "occupancy")
LIMITS = {"train": 600, "val": 200, "test": 400}
AfterStep = Callable[[int], Mapping[str, Tensor]]


class ValHalves(SplitChoice):
    """Half of the val simulations in place of val, the other half in place of test."""

    def samples(self, split: str) -> Samples:
        """All samples of train, or of val for both others."""
        return super().samples("train" if split == "train" else "val")

    def index(self, split: str) -> Array:
        """Numbers of the chosen samples.

        Raises:
            NotMeasuredError: val has one simulation, which chooses, and none is left to judge.
        """
        if split == "train":
            return super().index(split)
        groups = np.asarray(self.samples(split).groups)
        number = np.unique(groups, return_inverse=True)[1] % 2
        found = np.flatnonzero(number == (split == "test"))
        if not len(found):
            raise NotMeasuredError("val has one simulation: none is left to judge by")
        drawn = np.random.default_rng(self.seed).permutation(found)[: self.limits[split]]
        return np.sort(drawn)


@dataclass(frozen=True)
class ProbeCurve:
    """Measures every few steps, and keeps the points.

    Attributes:
        module: The network in training; its mode and the random generators are put back.
        choice: The samples.
        every: Steps between points.
        steps: Of the whole run: the last state is a point.
        folder: Where points lie until the end.
    """

    module: nn.Module
    choice: ValHalves
    every: int
    steps: int
    folder: Path

    @staticmethod
    def of(task: Task, data: Dataset, module: nn.Module, *, every: int, steps: int, folder: Path) -> ProbeCurve | None:
        """A curve that starts with the network as it is now; None where `every` is 0."""
        if not every:
            return None
        curve = ProbeCurve(module, ValHalves(task, data, LIMITS), every, steps, folder)
        curve.take(0)
        return curve

    def after(self, then: AfterStep | None) -> AfterStep:
        """What to call after each step: `then`, and a measurement where one is due."""

        def after_step(step: int) -> Mapping[str, Tensor]:
            found = then(step) if then is not None else {}
            if (step + 1) % self.every == 0 or step + 1 == self.steps:
                self.take(step + 1)
            return found

        return after_step

    def take(self, done: int) -> None:
        """Measure after `done` steps. Every process computes, the first one writes."""
        task = self.choice.task
        subject = Subject("training", task, self.module, features_of(self.module, task.io, task.teacher_layer),
                          why="no features: the network has no token backbone and no layer that the task names")
        bench = Bench(View(subject, self.choice))
        with torch.random.fork_rng():
            rows = {rung.name: measured(rung, bench).to_json() for rung in rungs_of(RUNGS)}
        if world()[0] == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = self.folder / ".point.tmp"
            unfinished.write_text(json.dumps(rows), encoding="utf-8")
            os.replace(unfinished, self.folder / f"{done:09d}.json")

    def write(self, draft: Draft) -> None:
        """Join the points into `probes.json`: rung → metric and [step, value, low, high] in order."""
        draft.write_json(NAME, joined({int(path.stem): json.loads(path.read_text(encoding="utf-8"))
                                       for path in sorted(self.folder.glob("0*.json"))}))


def joined(points: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Rows by step as one series a rung."""
    found: dict[str, Any] = {}
    for step, rows in points.items():
        for name, row in rows.items():
            series = found.setdefault(name, {"metric": row["metric"], "points": [], "reason": row["reason"]})
            series["points"].append([step, row["value"], row["low"], row["high"]])
    return found

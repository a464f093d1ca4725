"""What the steps of a run cost: the very objectives of `teacher train`, run on shapes alone.

Code that looks at its numbers, as some objectives' does, cannot run on shapes. Three small steps are then computed, and
the cost of a share follows from the parabola through them: nothing compares more than pairs of samples.

Legend: B samples of one process's share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fmdeploy.models import input_list
from fmdeploy.plan.fake import LOOKED, Pass, measure_pass
from fmdeploy.task import Samples, Task
from fmdeploy.teacher.objectives.pretraining import Pretraining, with_arrays
from fmdeploy.teacher.objectives.registry import Choice
from fmdeploy.training.config import Precision, StepConfig
from fmdeploy.training.loop import Batch, Tensors, to_tensors

FEW = (2, 3, 4)  # samples of the steps that are computed; some operators take another way for one alone
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Phase:
    """Steps of a run that do the same work.

    Attributes:
        first: Its first step, from 0.
        steps: How many there are.
        share: What one process's share of one part of a step costs.
        computed: Whether small steps were computed for that; else it ran on shapes alone.
    """

    first: int
    steps: int
    share: Pass
    computed: bool


@dataclass(frozen=True)
class Subject:
    """What is to be trained, on what.

    Attributes:
        task: Of the teacher.
        teacher: Its weights stay as they are.
        choices: The objectives.
        samples: Of a dataset, or standing in for them.
    """

    task: Task
    teacher: nn.Module
    choices: Sequence[Choice]
    samples: Samples

    def whole(self, steps: int) -> Pretraining:
        """The teacher with fresh parts of its objectives, for a run of `steps` steps."""
        return Pretraining(self.task, self.teacher, self.choices, steps=steps)

    def batch(self, whole: Pretraining, size: int) -> Batch:
        """Arrays (B, ...) as `PretrainingBatches` makes them, of `size` samples."""
        index = np.arange(size) % len(self.samples)
        inputs, targets = self.samples.batch(index)
        objectives = tuple(whole.each().values())
        rngs = [[np.random.default_rng(number) for number in range(size)] for _ in objectives]
        found, fixed = with_arrays({"inputs": inputs, "targets": targets}, objectives, self.samples, index, rngs)
        return found | fixed


def phases(subject: Subject, config: StepConfig, size: int, processes: int) -> tuple[Phase, ...]:
    """Cost of a run's steps, where each of `processes` has `size` samples of each part."""
    whole = subject.whole(config.steps)
    later = {step for objective in whole.each().values() for step in objective.changes() if step < config.steps}
    starts = sorted({0, *later})
    ends = [*starts[1:], config.steps]
    return tuple(_phase(subject, config, (size, processes), first, end - first)
                 for first, end in zip(starts, ends, strict=True))


def _phase(subject: Subject, config: StepConfig, share: tuple[int, int], first: int, steps: int) -> Phase:
    size, processes = share

    def look(samples: int, *, fake: bool) -> Pass:
        whole = subject.whole(config.steps)  # a fresh one: a pass leaves its traces in the objectives
        for objective in whole.each().values():
            objective.look_ahead(first, processes)
        small = subject.batch(whole, min(samples, FEW[0]) if fake else samples)
        return _measured(whole, small, samples, config.precision, fake=fake)

    try:
        return Phase(first, steps, look(size, fake=True), computed=False)
    except LOOKED:
        return Phase(first, steps, _through([look(few, fake=False) for few in FEW], size), computed=True)


def _through(passes: Sequence[Pass], size: int) -> Pass:
    """The pass over `size` samples on the parabola through those over `FEW` (Lagrange's form)."""
    parts = [math.prod((size - other) / (few - other) for other in FEW if other != few) for few in FEW]
    fields = [(one.forward_flops, one.total_flops, one.activation_bytes) for one in passes]
    return Pass(*(sum(part * value for part, value in zip(parts, values, strict=True))
                  for values in zip(*fields, strict=True)))


def _measured(whole: Pretraining, batch: Batch, size: int, precision: Precision, *, fake: bool) -> Pass:
    make = _shapes(batch, size) if fake else lambda: to_tensors(batch, CPU)
    return measure_pass(whole, lambda: _loss(whole, make()), precision, fake=fake)


def _shapes(batch: Batch, size: int) -> Callable[[], Tensors]:
    """Tensors of the kinds in `batch` with `size` samples, to be made where only shapes exist."""
    known = {kind: {name: (array.shape[1:], torch.from_numpy(array[:0]).dtype) for name, array in arrays.items()}
             for kind, arrays in batch.items()}
    return lambda: {kind: {name: torch.zeros((size, *shape), dtype=dtype) for name, (shape, dtype) in arrays.items()}
                    for kind, arrays in known.items()}


def _loss(whole: Pretraining, batch: Tensors) -> Tensor:
    """The sum of all parts; of an objective whose labels are not known, the sum of the network's outputs instead."""
    parts: list[Tensor] = []
    for objective in whole.each().values():
        if objective.needs_labels and not batch["targets"]:
            raw = whole.teacher(*input_list(objective.task.io, batch["inputs"]))
            parts += [value.float().sum() for value in _tensors(raw)]
        else:
            parts += [value.float() for value in objective.losses(whole.teacher, batch).values()]
    return torch.stack(parts).sum()


def _tensors(raw: object) -> list[Tensor]:
    if isinstance(raw, Tensor):
        return [raw]
    assert isinstance(raw, (dict, list, tuple))
    return [tensor for value in (raw.values() if isinstance(raw, dict) else raw) for tensor in _tensors(value)]

"""Quantisation-aware training: a few hundred steps in which the weights get used to the INT8 grid.

Gradients pass a quantizer as if it were the identity inside its range and stop outside (straight-through,
arXiv:1308.3432); ranges stay as calibrated, or are learned. BatchNorm is folded already: its statistics cannot drift.

    qat    the quantised student imitates the float student on every training frame, which needs no labels
    qad    it goes on learning from the teacher that made the float student, from the cache (see `qad.py`)

Every now and then the network is judged on the validation split. The best state stays, the untrained one included, so
that training never makes the primary metric worse there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fmdeploy.data.format import Dataset
from fmdeploy.errors import ConfigError
from fmdeploy.evaluate.evaluation import evaluate
from fmdeploy.models.outputs import input_list, named_outputs, predictor
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.build import quantizer_name
from fmdeploy.quantize.learned import training_quantizers
from fmdeploy.quantize.ptq import QuantisedStudent
from fmdeploy.quantize.sensitivity import SPLIT, validation_samples
from fmdeploy.task import Task
from fmdeploy.training.batches import SupervisedBatches
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.loop import Batch, Job, Tensors, Timing, fit
from fmdeploy.training.mixture.options import Mixture
from fmdeploy.training.validation import Validation


@dataclass(frozen=True)
class Lesson:
    """What the quantised student is trained on: `batch` and `losses` as in `training.loop.Job`."""

    batch: Callable[[int, int], Batch]
    losses: Callable[[nn.Module, Tensors], dict[str, Tensor]]


@dataclass(frozen=True)
class Imitation:
    """The loss of QAT: weighted parts `soft` (against the float student) and `hard` (against labels)."""

    task: Task
    student: nn.Module
    alpha_student: float
    alpha_labels: float

    def __call__(self, model: nn.Module, batch: Tensors) -> dict[str, Tensor]:
        """Return the parts that have weight, each a scalar."""
        inputs = input_list(self.task.io, batch["inputs"])
        outputs = named_outputs(self.task.io, model(*inputs))
        parts: dict[str, Tensor] = {}
        if self.alpha_student:
            self.student.to(inputs[0].device)
            with torch.no_grad():
                wanted = named_outputs(self.task.io, self.student(*inputs))
            parts["soft"] = self.alpha_student * self.task.distillation_loss(outputs, wanted)
        if self.alpha_labels:
            parts["hard"] = self.alpha_labels * self.task.loss(outputs, batch["targets"])
        return parts


def imitation(
    student: nn.Module, task: Task, data: Dataset, config: TrainingConfig, *, alpha_student: float, alpha_labels: float
) -> Lesson:
    """The lesson of QAT.

    Args:
        student: the float student that is imitated; not changed.
        task: its losses.
        data: its training split is used.
        config: batch and seed.
        alpha_student: weight of imitating `student`.
        alpha_labels: weight of the labels of the whole training split.

    Raises:
        ConfigError: both weights are 0.
    """
    if not alpha_student and not alpha_labels:
        raise ConfigError("QAT needs a loss", expected="alpha_student or alpha_labels above 0", found="both 0")
    batches = SupervisedBatches(task, Mixture(task.samples(data, "train")), config)
    frozen = copy.deepcopy(student).eval().requires_grad_(False)
    return Lesson(batches, Imitation(task, frozen, alpha_student, alpha_labels))


def validation(task: Task, data: Dataset, *, every: int, patience: int, count: int) -> Validation | None:
    """How training is judged: the primary metric on `count` samples of the validation split; None where it has none."""
    if not data.splits.get(SPLIT):
        return None
    samples, metric = validation_samples(task, data, count), task.metrics()[0]
    sign = 1.0 if metric.higher_is_better else -1.0

    def score(model: nn.Module) -> float:
        found = evaluate(predictor(model, task.io), samples, (metric,)).value(metric)
        return sign * found if np.isfinite(found) else float("nan")

    return Validation(every, patience, score)


def qat(
    quantised: QuantisedStudent, lesson: Lesson, config: TrainingConfig, *, folder: Path, log: Path,
    learn_scales: bool = False, judged: Validation | None = None, title: str = "qat",
) -> tuple[QuantisedStudent, Timing]:
    """Train `quantised.module` in place, resuming from the checkpoints in `folder`.

    Args:
        quantised: calibrated; its module is trained.
        lesson: batches and loss.
        config: steps, batch, rate and seed.
        folder: of checkpoints.
        log: the JSON-lines log.
        learn_scales: train the ranges, too (LSQ, arXiv:1902.08153); otherwise they stay as calibrated.
        judged: how it is judged on the way; None keeps the last state.
        title: for the progress bar.

    Returns:
        The same module with the calibration that now holds, and how long it took.

    Raises:
        ConfigError: the student was quantised module by module.
        DivergedError: the loss became NaN.
    """
    if quantised.placement.method == "modules":
        raise ConfigError("training on the grid needs a student that torch.fx or torch.export can trace: otherwise "
                          "BatchNorm cannot be folded", where=quantised.placement.reason, fix="Use --mode ptq")
    with training_quantizers(quantised.module, learn=learn_scales):
        timing = fit(Job(title, quantised.module, lesson.batch, lesson.losses, folder, log, judged), config)
        quantised.module.cpu()
    quantised.module.eval()
    return (_with_ranges(quantised) if learn_scales else quantised), timing


def _with_ranges(quantised: QuantisedStudent) -> QuantisedStudent:
    """With the ranges that the module has now in the calibration's table."""
    amax, rows = modelopt.ranges(quantised.module), dict(quantised.calibration.ranges)
    for name, row in rows.items():
        rows[name] = replace(row, amax=float(amax[quantizer_name(quantised.placement, name)]), method="learned")
    return replace(quantised, calibration=replace(quantised.calibration, ranges=rows))

"""Quantisation-aware training: a few hundred steps in which the weights get used to the INT8 grid.

Ranges stay as calibrated; gradients pass a quantizer as if it were the identity inside its range and stop outside
(straight-through, arXiv:1308.3432). BatchNorm is already folded, so its statistics cannot drift.
By default the quantised student imitates the float student on every training frame, which needs no labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fmdeploy.data.format import Dataset
from fmdeploy.errors import ConfigError
from fmdeploy.models.outputs import input_list, named_outputs
from fmdeploy.quantize.ptq import QuantisedStudent
from fmdeploy.task import Task
from fmdeploy.training.batches import SupervisedBatches
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.loop import Job, Tensors, Timing, fit


@dataclass(frozen=True)
class Imitation:
    """The loss: weighted parts `soft` (against the float student) and `hard` (against labels)."""

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
            with torch.no_grad():
                wanted = named_outputs(self.task.io, self.student(*inputs))
            parts["soft"] = self.alpha_student * self.task.distillation_loss(outputs, wanted)
        if self.alpha_labels:
            parts["hard"] = self.alpha_labels * self.task.loss(outputs, batch["targets"])
        return parts


def qat(
    quantised: QuantisedStudent, student: nn.Module, task: Task, data: Dataset, config: TrainingConfig, *,
    alpha_student: float, alpha_labels: float, folder: Path, log: Path,
) -> Timing:
    """Train `quantised.module` in place, resuming from the checkpoints in `folder`.

    Args:
        quantised: calibrated; its module is trained.
        student: the float student that it imitates.
        task: its losses.
        data: its training split is used.
        config: steps, batch, rate and seed.
        alpha_student: weight of imitating `student`.
        alpha_labels: weight of the labels.
        folder: of checkpoints.
        log: the JSON-lines log.

    Raises:
        ConfigError: both weights are 0, or torch.fx could not trace the student.
        DivergedError: the loss became NaN.
    """
    if not alpha_student and not alpha_labels:
        raise ConfigError("QAT needs a loss", expected="alpha_student or alpha_labels above 0", found="both 0")
    if quantised.placement.method != "graph":
        raise ConfigError("QAT needs a student that torch.fx can trace: otherwise BatchNorm cannot be folded",
                          where=quantised.placement.reason, fix="Use --mode ptq")
    student = student.eval().requires_grad_(False)
    batches = SupervisedBatches(task, task.samples(data, "train"), config)
    job = Job("qat", quantised.module, batches, Imitation(task, student, alpha_student, alpha_labels), folder, log)
    timing = fit(job, config)
    student.cpu()
    quantised.module.cpu().eval()
    return timing

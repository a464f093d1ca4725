"""The loss of distillation: labels, the teacher's logits, the teacher's features.

Legend: B batch, L labelled samples in front of it, D h w the teacher's map.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fmdeploy.distill.config import DistillConfig
from fmdeploy.models import input_list, named_outputs
from fmdeploy.task import Task
from fmdeploy.teacher.view import FEATURE, TeacherView
from fmdeploy.training.loop import Tensors
from fmdeploy.training.losses import feature_distance


@dataclass(frozen=True)
class Objective:
    """Weighted parts of the loss; called with the wrapped network and one batch of `DistillBatches`.

    Attributes:
        task: Its losses.
        config: The weights.
        projects: Whether the network is a `Pupil` that returns a projected map too.
        live: The teacher, when there is no cache.
    """

    task: Task
    config: DistillConfig
    projects: bool
    live: TeacherView | None

    def __call__(self, model: nn.Module, batch: Tensors) -> dict[str, Tensor]:
        """Parts `hard`, `soft` and `feature`; each that has weight and data."""
        raw = model(*input_list(self.task.io, batch["inputs"]))
        raw, projected_BDhw = raw if self.projects else (raw, None)
        outputs = named_outputs(self.task.io, raw)
        parts: dict[str, Tensor] = {}
        teacher = self._teacher(batch)
        labels = len(next(iter(batch["targets"].values())))
        if labels and (self.config.alpha_labels or not teacher):
            hard = self.task.loss({name: value[:labels] for name, value in outputs.items()}, batch["targets"])
            parts["hard"] = hard * (self.config.alpha_labels if teacher else 1.0)
        if teacher and self.config.alpha_logits:
            parts["soft"] = self.config.alpha_logits * self.task.distillation_loss(outputs, teacher)
        if projected_BDhw is not None:
            wanted_BDhw = teacher[FEATURE + self.task.teacher_layer]
            parts["feature"] = self.config.alpha_features * feature_distance(projected_BDhw, wanted_BDhw, axis=1)
        return parts

    def _teacher(self, batch: Tensors) -> dict[str, Tensor]:
        """The teacher's answers for the mirrored inputs: always its answers for the canonical view, mirrored.

        A cache holds only those; a live teacher that looked at the mirrored view would teach something else.
        """
        if self.live is None:
            return {name: value.float() for name, value in batch.get("teacher", {}).items()}
        return self.task.flip(self.live.tensors(batch["canonical"]), batch["mirror"]["mask"])

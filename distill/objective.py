"""The loss of distillation: labels, the teachers' outputs, the teachers' maps.

Legend: B batch, L labelled samples in front of it, D h w a teacher's map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fmdeploy.distill.ensemble import averaged
from fmdeploy.distill.losses.base import MapLoss, OutputLoss
from fmdeploy.distill.projector import LOG_VARIANCE, Match
from fmdeploy.distill.resolution import reduced
from fmdeploy.distill.statistics import Statistics
from fmdeploy.models import input_list, named_outputs
from fmdeploy.task import Geometry, Task
from fmdeploy.teacher.view import TeacherView
from fmdeploy.training.loop import Losses, Tensors


@dataclass(frozen=True)
class Objective:
    """Weighted parts of the loss; called with the wrapped network and one batch of `DistillBatches`.

    Attributes:
        task: Its losses.
        labels: Weight of the loss against labels; 0 leaves it out.
        outputs: Losses against outputs, with their weights.
        maps: Losses between maps, with their weights.
        voices: Number → share of the teachers whose outputs count (those with trained heads).
        together: Their probabilities are averaged; otherwise each has a loss of its own.
        matches: Which maps are compared; empty where the network is the bare student.
        statistics: Of the teacher's map of each match, where a loss wants them.
        wrapped: Whether the network is a `Pupil`.
        live: The teachers, when there is no cache.
    """

    task: Task
    labels: float = 1.0
    outputs: Sequence[tuple[OutputLoss, float]] = ()
    maps: Sequence[tuple[MapLoss, float]] = ()
    voices: Mapping[int, float] = field(default_factory=dict)
    together: bool = True
    matches: Sequence[Match] = ()
    statistics: Sequence[Statistics | None] = ()
    wrapped: bool = False
    live: Sequence[TeacherView] = ()

    def names(self, *, labelled: bool) -> list[str]:
        """Names of the parts, in the order of `__call__`."""
        found = ["labels"] if labelled and self.labels else []
        suffixes = [""] if self.together or len(self.voices) < 2 else [f".teacher{n}" for n in self.voices]
        found += [loss.name + suffix for loss, _ in self.outputs for suffix in suffixes]
        return found + [loss.name + self._suffix(match) for loss, _ in self.maps for match in self.matches]

    def __call__(self, model: nn.Module, batch: Tensors) -> Losses:
        """Weighted scalar parts under the name of their loss; each that has weight and data."""
        raw = model(*input_list(self.task.io, batch["inputs"]))
        raw, beside = raw if self.wrapped else (raw, {})
        outputs = named_outputs(self.task.io, raw)
        answers = self._answers(batch)
        parts: Losses = {}
        count = len(next(iter(batch["targets"].values())))
        if count and self.labels:
            labelled = {name: value[:count] for name, value in outputs.items()}
            parts["labels"] = self.labels * self.task.loss(labelled, batch["targets"])
        parts |= self._output_parts(outputs, answers) | self._map_parts(beside, answers)
        return weigh(parts, beside[LOG_VARIANCE]) if LOG_VARIANCE in beside else parts

    def _output_parts(self, outputs: dict[str, Tensor], answers: Sequence[dict[str, Tensor]]) -> Losses:
        parts: Losses = {}
        if not self.outputs or not self.voices:
            return parts
        if self.together or len(self.voices) == 1:
            chosen = [{spec.name: answers[n][spec.name] for spec in self.task.io.outputs} for n in self.voices]
            wanted = averaged(self.task, chosen, list(self.voices.values()))
            return {loss.name: weight * loss(self.task, outputs, wanted) for loss, weight in self.outputs}
        for loss, weight in self.outputs:
            for number, share in self.voices.items():
                part = weight * share * loss(self.task, outputs, answers[number])
                parts[f"{loss.name}.teacher{number}"] = part
        return parts

    def _map_parts(self, beside: dict[str, Tensor], answers: Sequence[dict[str, Tensor]]) -> Losses:
        parts: Losses = {}
        for loss, weight in self.maps:
            kind = "projected" if loss.projected else "map"
            for number, match in enumerate(self.matches):
                value = loss(beside[f"{kind}.{number}"], answers[match.teacher][match.answer], self.statistics[number])
                parts[loss.name + self._suffix(match)] = weight * match.share * value
        return parts

    def _suffix(self, match: Match) -> str:
        """What tells the parts of one loss apart, where there are several."""
        teachers = len({each.teacher for each in self.matches}) > 1
        layers = len({each.layer for each in self.matches}) > 1
        return (f".teacher{match.teacher}" if teachers else "") + (f".{match.layer}" if layers else "")

    def _answers(self, batch: Tensors) -> list[dict[str, Tensor]]:
        """Each teacher's answers for the moved inputs: always its answers for the canonical view, moved.

        A cache holds only those; a live teacher that looked at the moved view would teach something else.
        """
        if not self.live:
            cached = sorted((kind for kind in batch if kind.startswith("teacher")), key=lambda kind: int(kind[7:]))
            return [{name: value.float() for name, value in batch[kind].items()} for kind in cached]
        moves = batch["geometry"]
        geometry = Geometry(moves["flip"], moves.get("box"))  # type: ignore[arg-type]  # arrays and tensors alike
        found = [self.task.transform(view.tensors(batch["canonical"]), geometry) for view in self.live]
        if "resolution" in batch:
            factor = int(batch["resolution"]["factor"])
            found = [reduced(values, factor, mean=False) for values in found]
        return found


def weigh(parts: Losses, log_variance_K: Tensor) -> Losses:
    """Uncertainty weighting (arXiv:1705.07115, section 3.2): exp(-s) L + s / 2 for each of the K parts.

    s is the logarithm of a variance; at its first value 0 the parts weigh what they were given. It belongs to the
    training alone and is dropped with the projectors.
    """
    scaled = zip(parts.items(), log_variance_K.float().unbind(), strict=True)
    return {name: torch.exp(-s) * value + 0.5 * s for (name, value), s in scaled}

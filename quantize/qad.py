"""Quantisation-aware distillation: the teacher that made the float student goes on teaching, on the INT8 grid.

Batches and loss are those of `distill`: a few samples with labels, the others with the teacher's answers alone, from
the cache where there is one. Which labels may be seen, and how the parts weigh, is what the student was distilled
with; of several teachers, one goes on. Losses between maps are left out: the projector that compared them was thrown
away with the float training, and the quantised graph has no module that holds the student's map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmdeploy.artifact import Artifact
from fmdeploy.distill.assemble import assemble
from fmdeploy.distill.config import DistillConfig
from fmdeploy.distill.losses.registry import LABELS, OUTPUT_LOSSES
from fmdeploy.distill.sources import Sources, sources_of
from fmdeploy.errors import ConfigError
from fmdeploy.quantize.ptq import QuantisedStudent
from fmdeploy.quantize.qat import Lesson
from fmdeploy.training.config import TrainingConfig

KEPT = ("labels", "label_seed", "labelled_share", "mirror", "augment")
"""Options of `distill` that the student keeps on learning with."""


@dataclass(frozen=True)
class School:
    """Where a quantised student goes on learning: what `distill` would be told, and what it opened."""

    config: DistillConfig
    sources: Sources

    def lesson(self, quantised: QuantisedStudent) -> Lesson:
        """What `quantised`, the student on its grid, is trained on.

        Raises:
            ArtifactError: the cache belongs to something else.
        """
        nowhere = self.config.data  # nothing is written: `qat` has a folder of its own
        made = assemble(self.config, self.sources, folder=nowhere, log=nowhere, student=quantised.module)
        return Lesson(made.job.batch, made.job.losses)


def school(
    student: Artifact, config: TrainingConfig, *, data: Path, teacher: Path, features: Path | None, task: str,
    teacher_data: Sequence[Path] = (),
) -> School:
    """Open what QAD learns from.

    Args:
        student: the STUDENT that is quantised; says which labels it saw.
        config: steps, batch, rate, seed and precision.
        data: DATASET.
        teacher: TEACHER.
        features: FEATURES of that teacher; None runs it live.
        task: name of the task.
        teacher_data: other DATASETs that the teacher was trained on.

    Raises:
        ConfigError: the teacher was trained for another task.
        ArtifactError: an input is not what it should be.
        LeakageError: the teacher was trained on what the student is judged on.
    """
    wanted = DistillConfig(data=data, out=data, teacher=(teacher,), features=(features,) if features else (),
                           task=task, teacher_data=tuple(teacher_data), **_options(student, config))
    return School(wanted, sources_of(wanted))


def _options(student: Artifact, config: TrainingConfig) -> dict[str, Any]:
    """What `distill` was told, where the student comes from there; and this run's own steps, batch and so on."""
    known = student.manifest.config
    common = {name: getattr(config, name) for name in TrainingConfig.model_fields}
    if student.manifest.stage != "distill":
        raise ConfigError("was not made by distill, so that it is not known which labels it may see",
                          where=student.root, fix="Use --mode qat")
    return common | _losses(known) | {name: known[name] for name in KEPT if name in known}


def _losses(known: dict[str, Any]) -> dict[str, Any]:
    """The losses against labels and outputs, with their options; the task's own where the student had none."""
    kept = {LABELS, *OUTPUT_LOSSES}
    losses = [text for text in known.get("loss", ()) if text.partition("=")[0] in kept]
    taught = any(text.partition("=")[0] in OUTPUT_LOSSES for text in losses)
    used = {text.partition("=")[0] for text in losses} | set(known.get("augment", ()))
    return {"loss": tuple(losses if taught else [*losses, "logits=2"]),
            "set": tuple(text for text in known.get("set", ()) if text.partition(".")[0] in used)}

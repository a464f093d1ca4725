"""Scores of the student, and beside them those of its best teacher on the same samples."""

from __future__ import annotations

import math
import shutil
from typing import Any

import numpy as np

from fmdeploy.artifact import Artifact
from fmdeploy.distill.assemble import Assembly
from fmdeploy.distill.config import DistillConfig
from fmdeploy.distill.sources import Sources, Teacher
from fmdeploy.draft import Draft
from fmdeploy.evaluate.evaluation import Evaluation, evaluate
from fmdeploy.models import num_parameters, predictor
from fmdeploy.task import Task
from fmdeploy.teacher.scores import EVALUATIONS, metric_values, write_scores
from fmdeploy.teacher.view import TeacherView

Scores = dict[str, dict[str, float | None]]


def student_metrics(draft: Draft, config: DistillConfig, sources: Sources, made: Assembly) -> dict[str, Any]:
    """The content of `metrics.json`; writes the evaluations. A student without heads has none."""
    seen = made.batches.mixture.supervision(made.batches.labelled if made.batches.num_labelled else np.arange(0))
    found: dict[str, Any] = {
        "params": num_parameters(made.student), "heads": made.trains_heads,
        "labels": {"fraction": config.labels, **seen},
        **({"teacher_data": sources.elsewhere} if sources.elsewhere else {}),
    }
    if not made.trains_heads:
        return found
    scores = write_scores(draft, predictor(made.student, sources.task.io), sources.task, sources.data)
    found |= scores
    speaking = [teacher for teacher in sources.teachers if teacher.speaks]
    if speaking:
        found |= _beside_the_teacher(draft, config, sources, speaking, scores)
    return found


def _beside_the_teacher(
    draft: Draft, config: DistillConfig, sources: Sources, speaking: list[Teacher], scores: Scores
) -> dict[str, Any]:
    """The evaluations of the best teacher travel with the student: every later gate compares with them."""
    task = sources.task
    judged = [(teacher, _evaluations(config, sources, teacher)) for teacher in speaking]
    best, evaluations = max(judged, key=lambda pair: _primary(pair[1], task))
    theirs = {split: metric_values(evaluation, task.metrics()) for split, evaluation in evaluations.items()}
    for split, evaluation in evaluations.items():
        name = EVALUATIONS[split]
        if _is_of(best.artifact, name, evaluation.data):
            for suffix in (".json", ".safetensors"):
                shutil.copyfile(best.artifact.path(name + suffix), draft.path(f"teacher_{name}{suffix}"))
        else:
            evaluation.save(draft, f"teacher_{name}")
    return {"teacher": {"params": best.loaded.recipe.parameters, **theirs},
            **({"teachers": len(sources.teachers)} if len(sources.teachers) > 1 else {}),
            "retention": _retention(scores, theirs, task)}


def _evaluations(config: DistillConfig, sources: Sources, teacher: Teacher) -> dict[str, Evaluation]:
    """A teacher's evaluation on each held-out split: its own where that is of these samples, else made now."""
    found = {}
    for split, name in EVALUATIONS.items():
        if not sources.data.splits.get(split):
            continue
        wanted = f"{sources.data.digest}:{split}"
        if _is_of(teacher.artifact, name, wanted):
            found[split] = Evaluation.load(teacher.artifact, name)
        else:
            view = TeacherView(teacher.loaded.module, sources.task.io, (), config.precision)
            found[split] = evaluate(view.logits, sources.task.samples(sources.data, split), sources.task.metrics(),
                                    data=wanted)
    return found


def _is_of(artifact: Artifact, name: str, data: str) -> bool:
    return artifact.has(name + ".safetensors") and Evaluation.load(artifact, name).data == data


def _primary(evaluations: dict[str, Evaluation], task: Task) -> float:
    """The primary metric on the validation split, or the test split where there is none; larger is better."""
    metric = task.metrics()[0]
    if not evaluations:
        return -math.inf
    value = evaluations["val" if "val" in evaluations else "test"].value(metric)
    sign = 1.0 if metric.higher_is_better else -1.0
    return sign * value if math.isfinite(value) else -math.inf


def _retention(ours: Scores, theirs: Scores, task: Task) -> dict[str, float | None]:
    """Student over teacher in the primary metric, on each split."""
    name = task.metrics()[0].name
    pairs = {split: (ours[split][name], theirs.get(split, {}).get(name)) for split in ours}
    return {split: mine / other if mine is not None and other else None for split, (mine, other) in pairs.items()}

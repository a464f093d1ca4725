"""`distill`: train the student from labels, the teacher's logits and the teacher's features."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.command import command
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.distill.batches import DistillBatches
from fmdeploy.distill.config import DistillConfig
from fmdeploy.distill.objective import Objective
from fmdeploy.distill.projector import Pupil
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError
from fmdeploy.manifest import Kind
from fmdeploy.models import example_inputs, num_parameters, predictor
from fmdeploy.models.saved import LoadedModel, load_model, save_model
from fmdeploy.task import Task, load_task
from fmdeploy.teacher.cache import cache
from fmdeploy.teacher.features import CacheReader
from fmdeploy.teacher.scores import EVALUATIONS, write_curve, write_scores
from fmdeploy.teacher.view import FEATURE, TeacherView
from fmdeploy.training.device import resolve_precision, together
from fmdeploy.training.labelled import labelled_index
from fmdeploy.training.log import parse_log
from fmdeploy.training.loop import Job, fit


@dataclass(frozen=True)
class Sources:
    """What the student learns from."""

    task: Task
    data: Dataset
    teacher: Artifact | None = None
    loaded: LoadedModel | None = None
    features: Artifact | None = None

    def inputs(self) -> dict[str, Artifact]:
        """Roles of the artifacts, for the manifest."""
        given = {"data": self.data.artifact, "teacher": self.teacher, "features": self.features}
        return {role: artifact for role, artifact in given.items() if artifact is not None}


@command(DistillConfig)
def distill(config: DistillConfig) -> Artifact:
    """Train the student.

    Raises:
        ArtifactError: an input is not what it should be, or the cache belongs to something else.
        ConfigError: unknown task, student or layer; a teacher of another task.
        DivergedError: the loss became NaN.
    """
    config = config.model_copy(update={"precision": resolve_precision(config.precision)})
    sources = sources_of(config)
    return produce(
        config.out, Kind.STUDENT, stage="distill", config=config, inputs=sources.inputs(),
        build=lambda draft: _build(draft, config, sources), resumable=True,
    )


def sources_of(config: DistillConfig) -> Sources:
    """Open what `config` names; builds the cache when asked to."""
    sources = Sources(load_task(config.task), open_dataset(config.data))
    if config.teacher is None:
        return sources
    teacher = open_artifact(config.teacher, Kind.TEACHER)
    loaded = load_model(teacher)
    if loaded.recipe.task != config.task:
        raise ConfigError("the teacher was trained for another task", where=config.teacher,
                          expected=config.task, found=loaded.recipe.task)
    features = open_artifact(config.features, Kind.FEATURES) if config.features else None
    if config.build_cache:
        features = cache(teacher=config.teacher, data=config.data, out=config.build_cache, precision=config.precision)
    return replace(sources, teacher=teacher, loaded=loaded, features=features)


@dataclass(frozen=True)
class Assembly:
    """A student on its bench: the training job, and the parts that are needed after it."""

    student: nn.Module
    batches: DistillBatches
    job: Job


def assemble(
    config: DistillConfig, sources: Sources, *, folder: Path, log: Path, student: nn.Module | None = None
) -> Assembly:
    """Student, batches and objective as `config` wants them; checkpoints go to `folder`.

    Args:
        config: All options.
        sources: From `sources_of`.
        folder: Of checkpoints.
        log: The JSON-lines log.
        student: To train; None makes the one that `config` names.

    Raises:
        ArtifactError: the cache belongs to something else.
        ConfigError: no such student or layer.
    """
    torch.manual_seed(config.seed)
    student = student if student is not None else sources.task.student(config.student, config.sizes())
    batches = _batches(config, sources)
    live = _live(config, sources) if batches.live else None
    model = _with_projector(student, config, sources.task, batches.cache, live)
    objective = Objective(sources.task, config, isinstance(model, Pupil), live)
    return Assembly(student, batches, Job("student", model, batches, objective, folder=folder, log=log))


def _build(draft: Draft, config: DistillConfig, sources: Sources) -> None:
    with together():
        made = assemble(config, sources, folder=draft.path("work/student"), log=draft.path("log.jsonl"))
        timing = fit(made.job, config)
        if isinstance(made.job.model, Pupil):
            made.job.model.tap.remove()
        if draft.is_main:
            draft.note(training=timing.as_note())
            save_model(
                draft, made.student, task=config.task, role="student", name=config.student, options=config.sizes()
            )
            write_curve(draft, parse_log(draft.path("log.jsonl")))
            draft.write_json("metrics.json", _metrics(draft, made.student, config, sources, made.batches))


def _batches(config: DistillConfig, sources: Sources) -> DistillBatches:
    samples = sources.task.samples(sources.data, "train")
    reader = None
    if sources.features is not None and sources.teacher is not None:
        reader = CacheReader.open(
            sources.features, teacher=sources.teacher, data=sources.data.digest, split="train", samples=samples,
            preprocessing=sources.task.io.digest,
        )
    labelled = labelled_index(samples, config.labels, config.label_seed)
    live = sources.loaded is not None and reader is None
    return DistillBatches(sources.task, samples, labelled, config, reader, live)


def _live(config: DistillConfig, sources: Sources) -> TeacherView:
    assert sources.loaded is not None
    layers = (sources.task.teacher_layer,) if config.alpha_features and sources.task.teacher_layer else ()
    return TeacherView(sources.loaded.module, sources.task.io, layers, config.precision)


def _with_projector(
    student: nn.Module, config: DistillConfig, task: Task, cached: CacheReader | None, live: TeacherView | None
) -> nn.Module:
    """The student itself, or inside a `Pupil` when the teacher's features are to be matched."""
    if not config.alpha_features or not task.teacher_layer:
        return student
    name = FEATURE + task.teacher_layer
    if cached is not None:
        if name not in cached.shards[0]:
            raise ConfigError(f"the cache holds no features of {task.teacher_layer!r}", where=config.features,
                              found=", ".join(cached.shards[0]), fix="Build it with that layer, or --alpha-features 0")
        return Pupil(student, task.student_layer, cached.shards[0][name].shape[1:], task.io)
    if live is not None:
        names = [spec.name for spec in task.io.inputs]
        found = live.tensors(dict(zip(names, example_inputs(task.io), strict=True)))[name]
        return Pupil(student, task.student_layer, tuple(found.shape[1:]), task.io)
    return student


def _metrics(
    draft: Draft, student: nn.Module, config: DistillConfig, sources: Sources, batches: DistillBatches
) -> dict[str, Any]:
    """Scores of the student, and beside them those of its teacher."""
    total, used = len(batches.samples), len(batches.labelled)
    scores = write_scores(draft, predictor(student, sources.task.io), sources.task, sources.data)
    found: dict[str, Any] = {"params": num_parameters(student), **scores,
                             "labels": {"fraction": config.labels, "samples": used, "of": total}}
    if sources.teacher is not None:
        theirs = sources.teacher.json("metrics.json")
        _copy_evaluations(draft, sources.teacher)
        found["teacher"] = {key: theirs[key] for key in ("params", *EVALUATIONS) if key in theirs}
        found["retention"] = _retention(scores, theirs, sources.task)
    return found


def _retention(ours: dict[str, dict[str, float | None]], theirs: dict[str, Any], task: Task) -> dict[str, float | None]:
    """Student over teacher in the primary metric, on each split."""
    name = task.metrics()[0].name
    pairs = {split: (ours[split][name], theirs.get(split, {}).get(name)) for split in ours}
    return {split: mine / other if mine is not None and other else None for split, (mine, other) in pairs.items()}


def _copy_evaluations(draft: Draft, teacher: Artifact) -> None:
    """The teacher's evaluations travel with the student: every later gate compares with them."""
    for name in EVALUATIONS.values():
        for suffix in (".json", ".safetensors"):
            if teacher.has(name + suffix):
                shutil.copyfile(teacher.path(name + suffix), draft.path(f"teacher_{name}{suffix}"))

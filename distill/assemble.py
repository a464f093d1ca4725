"""A student on its bench: network, batches and loss as the options want them, ready for `training.loop.fit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fmdeploy.distill.augment import CONFIGS, Augmentation
from fmdeploy.distill.batches import DistillBatches
from fmdeploy.distill.config import DistillConfig
from fmdeploy.distill.losses.base import MapLoss, OutputLoss
from fmdeploy.distill.losses.registry import LOSSES, make_loss
from fmdeploy.distill.objective import Objective
from fmdeploy.distill.projector import Match, Pupil, freeze_unreached
from fmdeploy.distill.resolution import require_any_resolution
from fmdeploy.distill.sources import Sources, Teacher
from fmdeploy.distill.statistics import Statistics, measure
from fmdeploy.errors import ConfigError
from fmdeploy.provenance import source_digest
from fmdeploy.task import Array, Arrays, Samples
from fmdeploy.teacher.features import CacheReader
from fmdeploy.teacher.view import FEATURE, TeacherView
from fmdeploy.training.choices import settings
from fmdeploy.training.device import default_device
from fmdeploy.training.loop import Job
from fmdeploy.training.mixture.options import mix


@dataclass(frozen=True)
class Assembly:
    """A student on its bench: the training job, and the parts that are needed after it.

    Attributes:
        student: The network that is kept.
        batches: What it is trained on.
        objective: Its loss.
        job: Of the training loop.
        trains_heads: Whether labels or a teacher's outputs reach the student's outputs.
        frozen: Parameters that wanted no gradient because no loss reaches them.
    """

    student: nn.Module
    batches: DistillBatches
    objective: Objective
    job: Job
    trains_heads: bool
    frozen: Sequence[nn.Parameter]

    def release(self) -> None:
        """Take the hooks off the student, and let all of it want gradients again."""
        if isinstance(self.job.model, Pupil):
            self.job.model.remove()
        for parameter in self.frozen:
            parameter.requires_grad_(True)


def assemble(
    config: DistillConfig, sources: Sources, *, folder: Path, log: Path, student: nn.Module | None = None
) -> Assembly:
    """Student, batches and objective as `config` wants them; checkpoints go to `folder`.

    Args:
        config: All options.
        sources: From `sources_of`.
        folder: Of checkpoints.
        log: The JSON-lines log.
        student: To train; None makes the one that `config` names, or takes the one to start from.

    Raises:
        ArtifactError: a cache belongs to something else.
        ConfigError: no such student, layer or option; nothing to learn heads from.
    """
    torch.manual_seed(config.seed)
    if student is None:
        student = sources.start.module if sources.start else sources.task.student(config.student, config.sizes())
    options = _options(config)
    batches = _batches(config, sources, options)
    objective = _objective(config, sources, batches, options)
    if config.progressive:
        require_any_resolution(student, sources.task.io, config.progressive_factor)
    labelled = bool(batches.num_labelled and objective.labels)
    trains_heads = labelled or bool(objective.outputs and objective.voices)
    frozen: list[nn.Parameter] = []
    if not trains_heads:
        layers = list(dict.fromkeys(match.student_layer for match in objective.matches))
        frozen = freeze_unreached(student, layers, sources.task.io)
    model = student
    if objective.wrapped:
        learned = len(objective.names(labelled=labelled)) if config.weighting == "learned" else 0
        model = Pupil(student, objective.matches, sources.task.io, uncertainties=learned,
                      projected=any(loss.projected for loss, _ in objective.maps))
    job = Job("student", model, batches, objective, folder=folder, log=log)
    return Assembly(student, batches, objective, job, trains_heads, frozen)


def _options(config: DistillConfig) -> dict[str, Mapping[str, Any]]:
    """`--set` by name; every name must be in use."""
    found = settings(config.set, "NAME")
    weights = config.weights()
    used = {*weights.outputs, *weights.maps, *config.augment}
    for name in found:
        if name not in used:
            known = name in LOSSES or name in CONFIGS
            raise ConfigError("sets an option of what is not in use" if known else "sets an option of nothing known",
                              where=f"set {name!r}", expected=", ".join(sorted(used)) or "no options")
    return found


def _batches(config: DistillConfig, sources: Sources, options: Mapping[str, Mapping[str, Any]]) -> DistillBatches:
    reads_labels = config.weights().labels > 0 and (config.labels > 0 or bool(sources.replay))
    mixture = mix(config, sources.task, sources.data, sources.replay, config.seed, labels=reads_labels)
    cached = [teacher for teacher in sources.teachers if teacher.features is not None]
    caches = [_reader(teacher, sources, mixture.samples) for teacher in cached]
    labelled = mixture.labelled(config.labels, config.label_seed)
    labelled = np.arange(len(mixture.samples)) if labelled is None else labelled
    names = [name for name in config.augment if name != "flip" or config.mirror]
    augmentation = Augmentation.of(names, sources.task.io, options)
    return DistillBatches(sources.task, mixture, labelled, config, caches, bool(sources.teachers) and not caches,
                          augmentation)


def _reader(teacher: Teacher, sources: Sources, samples: Samples) -> CacheReader:
    assert teacher.features is not None
    return CacheReader.open(teacher.features, teacher=teacher.artifact, data=sources.data.digest, split="train",
                            samples=samples, preprocessing=sources.task.io.digest,
                            task_source=source_digest(teacher.loaded.recipe.task))


def _objective(
    config: DistillConfig, sources: Sources, batches: DistillBatches, options: Mapping[str, Mapping[str, Any]]
) -> Objective:
    weights = config.weights()
    made = {name: make_loss(name, options.get(name, {})) for name in (*weights.outputs, *weights.maps)}
    outputs = [(loss, weights.outputs[name]) for name, loss in made.items() if isinstance(loss, OutputLoss)]
    maps = [(loss, weights.maps[name]) for name, loss in made.items() if isinstance(loss, MapLoss)]
    for loss, _ in outputs:
        loss.check(sources.task)
    pairs = _pairs(config, sources) if maps else []
    live = live_views(config, sources, [layer for layer, _ in pairs]) if batches.live else []
    answers = [_answering(config, sources, batches, live, number) for number in range(len(sources.teachers))]
    matches = _matches(config, sources, pairs, answers) if pairs else []
    if maps and not matches and not outputs and not batches.num_labelled:
        raise ConfigError("this task names no layers to compare, so nothing reaches the student", where="loss",
                          fix="Give --layers TEACHER_LAYER:STUDENT_LAYER")
    needed = any(loss.needs_statistics for loss, _ in maps)
    statistics = _statistics(matches, answers, len(batches.samples)) if needed else [None] * len(matches)
    speaking = {number: teacher.share for number, teacher in enumerate(sources.teachers) if teacher.speaks}
    total = sum(speaking.values())
    return Objective(
        sources.task, weights.labels, outputs, maps if matches else [],
        {number: share / total for number, share in speaking.items()}, config.teacher_logits == "mean", matches,
        statistics, bool(matches) or (config.weighting == "learned" and bool(sources.teachers)), live,
    )


def _pairs(config: DistillConfig, sources: Sources) -> list[tuple[str, str]]:
    """(teacher's layer, student's layer) of each comparison.

    Raises:
        ConfigError: a pair is not of the form A:B.
    """
    task = sources.task
    if not config.layers:
        return [(task.teacher_layer, task.student_layer)] if task.teacher_layer and task.student_layer else []
    pairs = [text.split(":") for text in config.layers]
    for text, pair in zip(config.layers, pairs, strict=True):
        if len(pair) != 2 or not all(pair):
            raise ConfigError("is no pair of layers", where=f"layers {text!r}", expected="TEACHER_LAYER:STUDENT_LAYER")
    return [(theirs, ours) for theirs, ours in pairs]


def live_views(config: DistillConfig, sources: Sources, layers: Sequence[str]) -> list[TeacherView]:
    """Every teacher, frozen, with hooks on those of `layers` that it has."""
    return [TeacherView(teacher.loaded.module, sources.task.io,
                        tuple(dict.fromkeys(layer for layer in layers if _has(teacher, layer, sources))),
                        config.precision)
            for teacher in sources.teachers]


def _has(teacher: Teacher, layer: str, sources: Sources) -> bool:
    """One teacher's layer may be missing in another; a layer that none has is told by the hook."""
    owners = [t for t in sources.teachers if layer in dict(t.loaded.module.named_modules())]
    return not owners or teacher in owners


Answering = Callable[[Array], Arrays]


def _answering(
    config: DistillConfig, sources: Sources, batches: DistillBatches, live: Sequence[TeacherView], number: int
) -> Answering:
    """From sample numbers (B,) to what teacher `number` says, cached or live."""
    if batches.caches:
        return batches.caches[number].batch
    return lambda index: live[number].arrays(batches.samples.batch(index)[0], default_device())


def _matches(
    config: DistillConfig, sources: Sources, pairs: Sequence[tuple[str, str]], answers: Sequence[Answering]
) -> list[Match]:
    """Every pair of layers for every teacher that has it; the shares of those with a layer sum to 1.

    Raises:
        ConfigError: no teacher has the layer, or its cache holds none.
    """
    found: list[Match] = []
    shapes = [{name: array.shape[1:] for name, array in answer(np.zeros(1, np.int64)).items()} for answer in answers]
    for layer, ours in pairs:
        owners = [number for number, shape in enumerate(shapes) if FEATURE + layer in shape]
        if not owners:
            held = ", ".join(sorted({name for shape in shapes for name in shape}))
            raise ConfigError(f"the cache holds no features of {layer!r}", where=config.features[0], found=held,
                              fix="Build it with that layer, or leave losses between maps out of --loss")
        total = sum(sources.teachers[number].share for number in owners)
        found += [Match(number, layer, ours, shapes[number][FEATURE + layer], sources.teachers[number].share / total)
                  for number in owners]
    return found


def _statistics(matches: Sequence[Match], answers: Sequence[Answering], count: int) -> list[Statistics | None]:
    measured = {number: measure(answers[number], [m.answer for m in matches if m.teacher == number], count)
                for number in dict.fromkeys(match.teacher for match in matches)}
    return [measured[match.teacher][match.answer] for match in matches]

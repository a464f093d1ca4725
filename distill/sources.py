"""What the student learns from: the task, the data, teachers, their caches, and perhaps a student to start from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.trained_on import check_training_data
from fmdeploy.distill.config import DistillConfig
from fmdeploy.errors import ConfigError
from fmdeploy.manifest import Kind, numbered_role
from fmdeploy.models.saved import LoadedModel, load_model
from fmdeploy.task import Task, load_task
from fmdeploy.teacher.cache import cache
from fmdeploy.training.device import first_decides
from fmdeploy.training.mixture.options import replay_inputs


@dataclass(frozen=True)
class Teacher:
    """One of the teachers.

    Attributes:
        artifact: The TEACHER.
        loaded: Its network.
        share: How much it counts; the shares sum to 1.
        features: The FEATURES with its answers; None runs it live.
    """

    artifact: Artifact
    loaded: LoadedModel
    share: float = 1.0
    features: Artifact | None = None

    @property
    def speaks(self) -> bool:
        """Whether its outputs were trained; otherwise it has features alone."""
        return self.loaded.recipe.heads


@dataclass(frozen=True)
class Sources:
    """What the student learns from.

    Attributes:
        task: Its task.
        data: The dataset.
        teachers: In the order given.
        init: The STUDENT to start from.
        start: Its network.
        elsewhere: Other datasets in the lineage, and whether they were compared with the held-out splits.
        replay: Datasets of old domains that the student goes on seeing.
    """

    task: Task
    data: Dataset
    teachers: tuple[Teacher, ...] = ()
    init: Artifact | None = None
    start: LoadedModel | None = None
    elsewhere: dict[str, str] = field(default_factory=dict)
    replay: tuple[Dataset, ...] = ()

    def inputs(self) -> dict[str, Artifact]:
        """Roles of the artifacts, for the manifest: `teacher`, `teacher2`, …, and their `features` likewise."""
        found = {"data": self.data.artifact}
        for number, teacher in enumerate(self.teachers):
            found[numbered_role("teacher", number)] = teacher.artifact
            if teacher.features is not None and teacher.features.digest not in {a.digest for a in found.values()}:
                found[numbered_role("features", number)] = teacher.features
        return found | replay_inputs(self.replay) | ({"init": self.init} if self.init is not None else {})


def sources_of(config: DistillConfig) -> Sources:
    """Open what `config` names; builds the cache when asked to.

    Raises:
        ArtifactError: an input is not what it should be.
        ConfigError: a teacher or student of another task, or a teacher without heads asked for its logits.
        LeakageError: a teacher, or the student by replay, sees what the student is judged on.
    """
    task, data = load_task(config.task), open_dataset(config.data)
    teachers = tuple(_teacher(config, path, share) for path, share in config.teachers())
    _require_answers(config, teachers)
    init = open_artifact(config.init, Kind.STUDENT) if config.init else None
    start = _start(config, init) if init is not None else None
    seen = [teacher.artifact for teacher in teachers] + ([init] if init is not None else [])
    replay = tuple(open_dataset(path) for path in config.replay)
    elsewhere = first_decides(lambda: check_training_data(seen, data, config.teacher_data, replay=replay))
    return Sources(task, data, _with_features(config, teachers), init, start, elsewhere, replay)


def _teacher(config: DistillConfig, path: Path, share: float) -> Teacher:
    artifact = open_artifact(path, Kind.TEACHER)
    loaded = load_model(artifact)
    if loaded.recipe.task != config.task:
        raise ConfigError("the teacher was trained for another task", where=path, expected=config.task,
                          found=loaded.recipe.task)
    return Teacher(artifact, loaded, share)


def _require_answers(config: DistillConfig, teachers: tuple[Teacher, ...]) -> None:
    weights = config.weights()
    if weights.outputs and teachers and not any(teacher.speaks for teacher in teachers):
        raise ConfigError(
            "was pre-trained without labels: its outputs were never trained and teach nothing",
            where=teachers[0].artifact.root, found=f"--loss {next(iter(weights.outputs))}",
            fix="Take its features alone, such as --loss features=1 --labels 0, and train the heads afterwards with "
                "--init; or fine-tune it first: fmdeploy teacher train --init",
        )


def _start(config: DistillConfig, init: Artifact) -> LoadedModel:
    loaded = load_model(init)
    if loaded.recipe.task != config.task:
        raise ConfigError("the student to start from was made for another task", where=init.root,
                          expected=config.task, found=loaded.recipe.task)
    if "student" in config.model_fields_set and config.student != loaded.recipe.name:
        raise ConfigError("the student to start from is another network", where=init.root, expected=config.student,
                          found=loaded.recipe.name, fix="Leave --student out")
    return loaded


def _with_features(config: DistillConfig, teachers: tuple[Teacher, ...]) -> tuple[Teacher, ...]:
    folders = config.features
    if config.build_cache:
        layers = tuple(dict.fromkeys(text.partition(":")[0] for text in config.layers))
        cache(teacher=tuple(teacher.artifact.root for teacher in teachers), data=config.data, out=config.build_cache,
              layers=layers, precision=config.precision)
        folders = (config.build_cache,)
    opened = [open_artifact(folder, Kind.FEATURES) for folder in folders]
    opened = opened * len(teachers) if len(opened) == 1 else opened
    if not opened:
        return teachers
    return tuple(Teacher(t.artifact, t.loaded, t.share, f) for t, f in zip(teachers, opened, strict=True))

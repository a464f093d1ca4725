"""`cache`: the logits and feature maps of one teacher or several for every sample, computed once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.command import command
from fmdeploy.config import InputPath, Internal, OutputPath, StageConfig, validate
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError
from fmdeploy.manifest import Kind, numbered_role
from fmdeploy.models.saved import RECIPE, Recipe, load_model
from fmdeploy.progress import say
from fmdeploy.provenance import source_digest
from fmdeploy.task import Samples, Task, load_task
from fmdeploy.teacher.caching.finish import finish, shard_numbers
from fmdeploy.teacher.caching.index import Address, Share, digest_of_ids
from fmdeploy.teacher.caching.reuse import Shelf
from fmdeploy.teacher.caching.writing import CacheWriter
from fmdeploy.teacher.encodings.registry import read_feature, read_output
from fmdeploy.teacher.view import TeacherView
from fmdeploy.training.config import Precision
from fmdeploy.training.device import resolve_precision, together


class CacheConfig(StageConfig):
    """What is cached, and how precisely."""

    teacher: tuple[InputPath, ...] = Field(min_length=1, description="TEACHER; repeat it to cache several")
    data: InputPath = Field(description="DATASET")
    out: OutputPath = Field(description="Where the FEATURES are written")
    split: Literal["train", "val", "test", "all"] = Field(default="train", description="split whose samples are cached")
    layers: tuple[str, ...] = Field(default=(), description="modules to keep; none given: the task's choice")
    encoding: str = Field(default="float16", description=(
        "of features: float16, float32, int8, or pca:AMOUNT+ENCODING with AMOUNT components or share of the variance"))
    logits: tuple[str, ...] = Field(default=("float16",), description=(
        "of outputs: float16, float32, int8, uint8 or topk:K, for all or as NAME=ENCODING; may be repeated"))
    precision: Precision = Field(default="auto", description="arithmetic; auto: what this device is fast at")
    per_shard: int = Field(default=512, ge=1, description="samples a file")
    batch: int = Field(default=64, ge=1, description="samples a forward pass")
    shard: str = Field(default="", description="i/n: only every n-th file from the i-th on, for cache-merge to join")
    reuse: tuple[InputPath, ...] = Field(default=(), description="FEATURES to take what matches from; may be repeated")
    task_source: Annotated[str | None, Internal()] = Field(default=None, description="hash of a user's own task's code")

    @field_validator("teacher", "reuse", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, (str, Path)):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @field_validator("encoding")
    @classmethod
    def _spelled(cls, value: str) -> str:
        try:
            return str(read_feature(value))
        except ConfigError as error:
            raise ValueError(str(error)) from error

    @field_validator("shard")
    @classmethod
    def _a_share(cls, value: str) -> str:
        if value and not 1 <= int((re.fullmatch(r"(\d+)/(\d+)", value) or [0, 0])[1]) <= int(value.partition("/")[2]):
            raise ValueError("must be i/n with i from 1 to n, such as 1/4")
        return value

    def resolved(self) -> dict[str, Any]:
        """Without the source of a built-in task, which has none."""
        return {name: value for name, value in super().resolved().items() if (name, value) != ("task_source", None)}

    @property
    def share(self) -> Share | None:
        """Which part of the shards is written; None for all."""
        number, _, of = self.shard.partition("/")
        return Share(number=int(number), of=int(of)) if of else None


@dataclass(frozen=True)
class Work:
    """What one run reads."""

    config: CacheConfig
    task: Task
    teachers: Sequence[Artifact]
    data: Dataset
    samples: Samples
    addresses: Sequence[Address]

    def view(self, number: int) -> TeacherView:
        """Load a teacher: only when there is something for it to do."""
        loaded = load_model(self.teachers[number])
        return TeacherView(loaded.module, self.task.io, self.addresses[number].layers, self.config.precision)


@command(CacheConfig)
def cache(config: CacheConfig) -> Artifact:
    """Write the logits and features of teachers for one split to disk.

    A teacher whose heads were never trained gives features only. docs/cache.md describes the encodings.

    Raises:
        ArtifactError: an input is not what it should be, or something else is at `out`.
        ConfigError: the teacher has no such layer, the teachers are of different tasks, an encoding does not fit.
        DataError: a teacher's answer cannot be stored (NaN, or beyond float16).
    """
    teachers, data = [open_artifact(path, Kind.TEACHER) for path in config.teacher], open_dataset(config.data)
    config = config.model_copy(update={"precision": resolve_precision(config.precision)})
    work = _work(config, teachers, data)
    shelf = Shelf(config.reuse)
    return produce(
        config.out, Kind.FEATURES, stage="cache", config=work.config,
        inputs={**teacher_roles(teachers), "data": data.artifact},
        build=lambda draft: _build(draft, work, shelf), resumable=True,
    )


def teacher_roles(teachers: Sequence[Artifact]) -> dict[str, Artifact]:
    """`teacher`, `teacher2`, … in the order given."""
    return {numbered_role("teacher", number): teacher for number, teacher in enumerate(teachers)}


def _work(config: CacheConfig, teachers: Sequence[Artifact], data: Dataset) -> Work:
    recipes = [validate(Recipe, one.json(RECIPE), where=one.path(RECIPE)) for one in teachers]
    for one, recipe in zip(teachers, recipes, strict=True):
        if recipe.task != recipes[0].task:
            raise ConfigError("the teachers are of different tasks", where=one.root, expected=recipes[0].task,
                              found=recipe.task, fix="Cache them apart")
    if len({one.digest for one in teachers}) < len(teachers):
        raise ConfigError("the same teacher is given twice", where="teacher")
    task = load_task(recipes[0].task)
    samples = task.samples(data, config.split)
    layers = config.layers or tuple(filter(None, (task.teacher_layer,)))
    logits = _logits(config, task)
    config = config.model_copy(update={"layers": layers, "task_source": source_digest(recipes[0].task)})
    addresses = [_address(config, logits if recipe.heads else {}, task, samples, one, data)
                 for one, recipe in zip(teachers, recipes, strict=True)]
    num_shards = -(-len(samples) // config.per_shard)
    if config.share is not None and config.share.number > num_shards:
        raise ConfigError("this share has no file to write", where="shard", expected=f"i/n with i up to {num_shards}",
                          found=config.shard, fix="Use fewer shares, or a smaller --per-shard")
    return Work(config, task, teachers, data, samples, addresses)


def _address(config: CacheConfig, logits: dict[str, str], task: Task, samples: Samples, teacher: Artifact,
             data: Dataset) -> Address:
    if not config.layers and not logits:
        raise ConfigError("there is nothing to cache: its heads were never trained, and no layer is named",
                          where=teacher.root, fix="Name one with --layers")
    return Address(
        teacher=teacher.digest, data=data.digest, split=config.split, samples=digest_of_ids(samples),
        preprocessing=task.io.digest, layers=config.layers, encoding=config.encoding, logits=logits,
        precision=config.precision, batch=config.batch, per_shard=config.per_shard, task_source=config.task_source,
    )


def _logits(config: CacheConfig, task: Task) -> dict[str, str]:
    """Output → its encoding."""
    names = [spec.name for spec in task.io.outputs]
    chosen = dict.fromkeys(names, "float16")
    for text in sorted(config.logits, key=lambda text: "=" in text):  # what names an output wins
        name, _, spelled = text.rpartition("=")
        if name and name not in names:
            raise ConfigError("the task has no such output", where="logits", expected=", ".join(names), found=name)
        chosen.update(dict.fromkeys([name] if name else names, str(read_output(spelled))))
    return chosen


def _build(draft: Draft, work: Work, shelf: Shelf) -> None:
    with together():
        for number, address in enumerate(work.addresses):
            writer = CacheWriter(
                draft, address, work.samples, fitting=lambda: work.task.samples(work.data, "train"),
                view=lambda number=number: work.view(number), shelf=shelf,  # type: ignore[misc]
            )
            writer.write(shard_numbers(-(-len(work.samples) // address.per_shard), work.config.share))
    if draft.is_main:
        if shelf.taken:
            say(f"took {shelf.taken} files from --reuse")
        finish(draft, work.addresses, len(work.samples), work.config.share)

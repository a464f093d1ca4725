"""`cache`: the teacher's logits and feature maps of every training sample, computed once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field
from safetensors.numpy import save_file

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.command import command
from fmdeploy.config import InputPath, OutputPath, StageConfig
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.draft import Draft, produce
from fmdeploy.manifest import Kind
from fmdeploy.models.saved import LoadedModel, load_model
from fmdeploy.progress import progress
from fmdeploy.task import Arrays, Samples
from fmdeploy.teacher.features import INDEX, Address, Index, digest_of_ids, shard_name
from fmdeploy.teacher.view import TeacherView
from fmdeploy.training.config import Precision
from fmdeploy.training.device import default_device, resolve_precision, together
from fmdeploy.training.distributed import world


class CacheConfig(StageConfig):
    """What is cached, and how precisely."""

    teacher: InputPath = Field(description="TEACHER")
    data: InputPath = Field(description="DATASET")
    out: OutputPath = Field(description="Where the FEATURES are written")
    split: Literal["train", "val", "test", "all"] = Field(default="train", description="which samples")
    layers: tuple[str, ...] = Field(default=(), description="modules to keep; none given: the task's choice")
    dtype: Literal["float16", "float32"] = Field(default="float16", description="of what is stored")
    precision: Precision = Field(default="auto", description="arithmetic; auto: what this device is fast at")
    per_shard: int = Field(default=512, ge=1, description="samples a file")
    batch: int = Field(default=64, ge=1, description="samples a forward pass")


@command(CacheConfig)
def cache(config: CacheConfig) -> Artifact:
    """Write the teacher's logits and features of one split to disk.

    Raises:
        ArtifactError: an input is not what it should be, or something else is at `out`.
        ConfigError: the teacher has no such layer.
    """
    teacher, data = open_artifact(config.teacher, Kind.TEACHER), open_dataset(config.data)
    loaded = load_model(teacher)
    layers = config.layers or tuple(filter(None, (loaded.task.teacher_layer,)))
    config = config.model_copy(update={"precision": resolve_precision(config.precision), "layers": layers})
    return produce(
        config.out, Kind.FEATURES, stage="cache", config=config, inputs={"teacher": teacher, "data": data.artifact},
        build=lambda draft: _build(draft, config, loaded, teacher, data), resumable=True,
    )


def _build(draft: Draft, config: CacheConfig, loaded: LoadedModel, teacher: Artifact, data: Dataset) -> None:
    samples = loaded.task.samples(data, config.split)
    with together():
        view = TeacherView(loaded.module, loaded.task.io, config.layers, config.precision)
        _write_shards(draft, config, view, samples)
    if draft.is_main:
        address = Address(
            teacher=teacher.digest, data=data.digest, split=config.split, samples=digest_of_ids(samples),
            preprocessing=loaded.task.io.digest, layers=config.layers, dtype=config.dtype,
        )
        index = Index(address=address, num_samples=len(samples), per_shard=config.per_shard)
        draft.write_json(INDEX, index.model_dump(mode="json"))
        size = sum((draft.root / shard_name(n)).stat().st_size for n in range(_num_shards(config, samples)))
        draft.write_json("metrics.json", {"samples": len(samples), "bytes": size,
                                          "bytes_per_sample": size / len(samples)})


def _num_shards(config: CacheConfig, samples: Samples) -> int:
    return -(-len(samples) // config.per_shard)


def _write_shards(draft: Draft, config: CacheConfig, view: TeacherView, samples: Samples) -> None:
    """Every process writes its own shards; those that a killed run has finished are kept."""
    rank, size = world()
    mine = range(_num_shards(config, samples))[rank::size]
    with progress("cache", total=len(mine)) as bar:
        for number in mine:
            target = draft.path(shard_name(number))
            if not target.is_file():
                start = number * config.per_shard
                index = np.arange(start, min(start + config.per_shard, len(samples)))
                _write_whole(target, _collect(_forward(config, view, samples, index), config.dtype))
            bar.advance()


def _forward(config: CacheConfig, view: TeacherView, samples: Samples, index: np.ndarray) -> Iterator[Arrays]:
    for start in range(0, len(index), config.batch):
        inputs, _ = samples.batch(index[start : start + config.batch])
        yield view.arrays(inputs, default_device())


def _collect(parts: Iterator[Arrays], dtype: str) -> Arrays:
    """The parts of one shard behind each other, in the type that is stored."""
    kept = [{name: array.astype(dtype) for name, array in part.items()} for part in parts]
    # safetensors writes the buffer as it lies: an array that is laid out channels-last would come back scrambled.
    return {name: np.ascontiguousarray(np.concatenate([part[name] for part in kept])) for name in kept[0]}


def _write_whole(target: Path, tensors: Arrays) -> None:
    """Write a file that is complete or absent; a leftover starts with a dot and is dropped when sealing."""
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    save_file(tensors, unfinished)
    os.replace(unfinished, target)

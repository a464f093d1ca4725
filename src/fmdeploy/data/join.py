"""`data join`: the sequences of several datasets in one, each in the split that it was in.

For a model that is to serve several domains and learns them together. Shards are hard links where the file system
allows it, so a joint dataset costs no space.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fmdeploy.artifact import Artifact
from fmdeploy.command import command
from fmdeploy.config import InputPath, OutputPath, Positional, StageConfig
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.leakage import refuse_leaks
from fmdeploy.data.writer import write_index
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import DataError
from fmdeploy.manifest import Kind


class JoinConfig(StageConfig):
    """What to join."""

    data: Annotated[tuple[InputPath, ...], Positional()] = Field(min_length=2, description="DATASETs, at least two")
    out: OutputPath = Field(description="Folder of the joint DATASET")


@command(JoinConfig)
def join(config: JoinConfig) -> Artifact:
    """Join datasets, each sequence in the split that it was in.

    Raises:
        DataError: a sequence id is in two of them.
        LeakageError: a seed, simulation or recording would be in two splits.
    """
    parts = [open_dataset(path) for path in config.data]
    _require_unique(parts, config.data)
    splits = _splits(parts)
    refuse_leaks([sequence for part in parts for sequence in part.sequences], splits, config.out)
    inputs = {f"data{number}": part.artifact for number, part in enumerate(parts)}
    return produce(config.out, Kind.DATASET, stage="data join", config=config, inputs=inputs,
                   build=lambda draft: _build(draft, parts, splits))


def _require_unique(parts: Sequence[Dataset], paths: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for part, path in zip(parts, paths, strict=True):
        for sequence in part.sequences:
            if sequence.id in seen:
                raise DataError(f"the sequence {sequence.id} is also in {seen[sequence.id]}", where=path,
                                fix="Record one of them with another --seed")
            seen[sequence.id] = path


def _splits(parts: Sequence[Dataset]) -> dict[str, list[str]]:
    names = list(dict.fromkeys(name for part in parts for name in part.splits))
    return {name: [i for part in parts for i in part.splits.get(name, ())] for name in names}


def _build(draft: Draft, parts: Sequence[Dataset], splits: dict[str, list[str]]) -> None:
    index: list[dict[str, Any]] = []
    shards = 0
    for part in parts:
        new = {name: f"shards/{shards + k:05d}.tar" for k, name in enumerate(sorted({s.shard for s in part.sequences}))}
        shards += len(new)
        for name, target in new.items():
            _place(part.artifact.path(name), draft.path(target))
        index += [{"id": s.id, "shard": new[s.shard], "frames": s.frames, "metadata": dict(s.metadata)}
                  for s in part.sequences]
    write_index(draft, index, splits)


def _place(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)

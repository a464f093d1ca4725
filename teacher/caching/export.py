"""`cache-export`: samples with the teachers' answers as WebDataset shards, for a cluster that streams its data.

    <split>-00000.tar    <id>.input.<name>.npy  <id>.target.<name>.npy  <id>.<teacher>.<name>.npy  <id>.json
    index.json           shards with their SHA-256, teachers, dataset, arrays

`<teacher>` is `teacher`, `teacher2`, …, in the order of the FEATURES; `<id>` is the sample's own name, which is also
WebDataset's key. Tar members carry no time or owner, so equal content gives equal bytes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from fmdeploy.artifact import Artifact, entry_of, open_artifact
from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, OutputPath, StageConfig
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.errors import ArtifactError, DataError
from fmdeploy.manifest import Kind, numbered_role
from fmdeploy.progress import progress
from fmdeploy.provenance import source_digest
from fmdeploy.task import Array, Arrays, Samples, load_task
from fmdeploy.teacher.caching.index import read_index
from fmdeploy.teacher.features import CacheReader

READ_TOGETHER = 32


class ExportConfig(StageConfig):
    """What is exported."""

    features: InputPath = Field(description="FEATURES")
    data: InputPath = Field(description="the DATASET they were made from")
    out: OutputPath = Field(description="New folder for the tar files")
    task: str = Field(default="bev-occupancy", description="built-in task, or module:Class")
    per_shard: int = Field(default=1000, ge=1, description="samples a tar file")


@dataclass(frozen=True)
class Source:
    """What is exported: samples, and a reader for each teacher by its role."""

    samples: Samples
    readers: Mapping[str, CacheReader]
    split: str


@command(ExportConfig)
def export(config: ExportConfig) -> Outcome:
    """Write inputs, labels and cached answers as WebDataset tar files. Arrays are decoded, as training sees them.

    Raises:
        ArtifactError: the features belong to another dataset, or something is at `out`.
        DataError: a sample's name cannot be a WebDataset key.
    """
    features, data = open_artifact(config.features, Kind.FEATURES), open_dataset(config.data)
    source = _source(config, features, data)
    out = Path(os.path.abspath(config.out))
    if os.path.lexists(out):
        raise ArtifactError("already exists", where=out, fix="Name a new --out")
    scratch = out.with_name(f".{out.name}.{os.getpid()}.partial")
    scratch.mkdir(parents=True)
    try:
        shards = [_write(scratch, source, start, config.per_shard)
                  for start in range(0, len(source.samples), config.per_shard)]
        index = {"features": features.digest, "data": data.digest, "samples": len(source.samples),
                 "teachers": {role: reader.cache.address.teacher for role, reader in source.readers.items()},
                 "shards": shards}
        (scratch / "index.json").write_text(json.dumps(index, sort_keys=True, indent=1) + "\n")
        os.rename(scratch, out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    line = f"{len(source.samples)} samples in {len(shards)} tar files at {out}"
    return Outcome((line,), {**index, "path": str(out)})


def _source(config: ExportConfig, features: Artifact, data: Dataset) -> Source:
    task, caches = load_task(config.task), read_index(features).caches
    split = caches[0].address.split
    samples = task.samples(data, split)
    if bad := [name for name in samples.ids if "." in name]:
        raise DataError("this name cannot be a WebDataset key, which ends at the first dot", where=data.artifact.root,
                        found=bad[0])
    readers = {numbered_role("teacher", number): CacheReader.open(
        features, teacher=cache.address.teacher, data=data.digest, split=split, samples=samples,
        preprocessing=task.io.digest, task_source=source_digest(config.task)) for number, cache in enumerate(caches)}
    return Source(samples, readers, split)


def _write(folder: Path, source: Source, start: int, count: int) -> dict[str, Any]:
    """One tar file, synced; its record in the index."""
    path = folder / f"{source.split}-{start // count:05d}.tar"
    index = np.arange(start, min(start + count, len(source.samples)))
    with path.open("wb") as stream, progress(path.name, total=len(index)) as bar:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, payload in _members(source, index):
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(payload), 0o644
                tar.addfile(info, io.BytesIO(payload))
                bar.advance(int(name.endswith(".json")))
        stream.flush()
        os.fsync(stream.fileno())
    return {"name": path.name, "samples": len(index), **entry_of(path).model_dump(mode="json")}


def _members(source: Source, index: Array) -> Iterator[tuple[str, bytes]]:
    """Name and content of each member, sample by sample."""
    for start in range(0, len(index), READ_TOGETHER):
        rows = index[start : start + READ_TOGETHER]
        inputs, targets = source.samples.batch(rows)
        kinds: dict[str, Arrays] = {"input": inputs, "target": targets}
        kinds |= {role: reader.batch(rows) for role, reader in source.readers.items()}
        for place, row in enumerate(rows.tolist()):
            for kind, arrays in kinds.items():
                for name, array in arrays.items():
                    yield f"{source.samples.ids[row]}.{kind}.{name}.npy", _npy(array[place])
            yield f"{source.samples.ids[row]}.json", _about(source.samples, row)


def _npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array, order="C"), allow_pickle=False)
    return buffer.getvalue()


def _about(samples: Samples, row: int) -> bytes:
    """Name, group and slices of one sample."""
    slices = {name: str(labels[row]) for name, labels in samples.slices.items()}
    return json.dumps({"id": samples.ids[row], "group": int(samples.groups[row]), "slices": slices},
                      sort_keys=True).encode()

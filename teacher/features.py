"""Reading a FEATURES artifact: logits and maps of the teacher by sample number, from memory maps.

    features/00000.safetensors   one tensor a name, (samples of the shard, ...)
    index.json                   what they were made from

Legend: B batch, S samples of one shard.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from fmdeploy.artifact import Artifact
from fmdeploy.config import validate
from fmdeploy.errors import ArtifactError
from fmdeploy.manifest import canonical
from fmdeploy.task import Array, Arrays, Samples

INDEX = "index.json"
NUMPY = {"F16": np.float16, "F32": np.float32}


class Address(BaseModel):
    """What cached features depend on. Two equal addresses hold equal features."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: str
    data: str
    split: str
    samples: str
    preprocessing: str
    layers: tuple[str, ...]
    dtype: Literal["float16", "float32"]


class Index(BaseModel):
    """The content of `index.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: Address
    num_samples: int
    per_shard: int


def digest_of_ids(samples: Samples) -> str:
    """sha256 over the samples' names, in order."""
    return hashlib.sha256(canonical(list(samples.ids))).hexdigest()


def shard_name(number: int) -> str:
    """Payload name of one shard."""
    return f"features/{number:05d}.safetensors"


@dataclass(frozen=True)
class CacheReader:
    """Random access to a cache.

    Attributes:
        index: What it holds.
        shards: For each shard, name → (S, ...) array over the mapped file.
    """

    index: Index
    shards: Sequence[Arrays]

    @classmethod
    def open(cls, artifact: Artifact, *, teacher: Artifact, data: str, split: str, samples: Samples,
             preprocessing: str) -> CacheReader:
        """Map the shards of `artifact`, if they are what this teacher says about these samples.

        Args:
            artifact: An opened (so verified) FEATURES.
            teacher: The teacher the student learns from.
            data: Digest of the dataset.
            split: Which split is trained on.
            samples: Its samples.
            preprocessing: Digest of the task's `io`.

        Raises:
            ArtifactError: it was made from another teacher, dataset, split or preprocessing.
        """
        index = validate(Index, artifact.json(INDEX), where=artifact.path(INDEX))
        wanted = {"teacher": teacher.digest, "data": data, "split": split, "preprocessing": preprocessing,
                  "samples": digest_of_ids(samples)}
        for key, value in wanted.items():
            if (found := getattr(index.address, key)) != value:
                raise ArtifactError(
                    f"the cache is stale or foreign: it was made from another {key}", where=artifact.root,
                    expected=value[:12], found=found[:12], fix="Build it again: fmdeploy cache",
                )
        count = -(-index.num_samples // index.per_shard)
        return cls(index, [map_safetensors(artifact.path(shard_name(number))) for number in range(count)])

    def batch(self, index: Array) -> Arrays:
        """Arrays (B, ...) of the samples `index` (B,), copied out of the maps shard by shard."""
        shard_B, row_B = np.divmod(index, self.index.per_shard)
        result = {name: np.empty((len(index), *array.shape[1:]), array.dtype) for name, array in self.shards[0].items()}
        for number in np.unique(shard_B):
            mine = np.flatnonzero(shard_B == number)
            for name, array in self.shards[number].items():
                result[name][mine] = array[row_B[mine]]
        return result


def map_safetensors(path: Path) -> Arrays:
    """Arrays over the memory-mapped safetensors file at `path`, read-only.

    `safetensors` itself copies each tensor it returns; random rows of many gigabytes must not be.

    Raises:
        ArtifactError: the header does not fit the file.
    """
    with path.open("rb") as stream:
        view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    size = int.from_bytes(view[:8], "little")
    header: dict[str, Any] = json.loads(view[8 : 8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        dtype, shape, (start, end) = np.dtype(NUMPY[entry["dtype"]]), entry["shape"], entry["data_offsets"]
        if 8 + size + end > len(view) or end - start != dtype.itemsize * int(np.prod(shape)):
            raise ArtifactError(f"the header of {name} does not fit the file", where=path)
        flat = np.frombuffer(view, dtype, count=int(np.prod(shape)), offset=8 + size + start)
        found[name] = flat.reshape(shape)
    return found

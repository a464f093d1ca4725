"""`index.json` of a FEATURES artifact: whose answers it holds, for which samples, and how they are stored.

    index.json                            one record a teacher
    features/<key>/00000.safetensors …    that teacher's shards; the key is the hash of its address
    features/<key>/basis.safetensors      only with PCA: the components
"""

from __future__ import annotations

import hashlib

from pydantic import BaseModel, ConfigDict, Field

from fmdeploy.artifact import Artifact
from fmdeploy.config import validate
from fmdeploy.errors import ArtifactError
from fmdeploy.manifest import canonical
from fmdeploy.task import Samples

INDEX = "index.json"
METRICS = "metrics.json"
REBUILD = "Build it again: fmdeploy cache"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Address(_Frozen):
    """All that the bytes of a cache depend on. Two equal addresses hold equal bytes, on one kind of machine."""

    teacher: str
    data: str
    split: str
    samples: str
    preprocessing: str
    layers: tuple[str, ...]
    encoding: str
    logits: dict[str, str]
    precision: str
    batch: int
    per_shard: int = Field(ge=1)
    task_source: str | None = None
    """Hash of the code of a user's own task; None for a built-in one, whose caches keep the keys that they had."""

    @property
    def key(self) -> str:
        """Name of the cache's folder: the first 16 hex digits of the hash of the address."""
        return hashlib.sha256(canonical(self.model_dump(mode="json", exclude_none=True))).hexdigest()[:16]


class Stored(_Frozen):
    """One named array: the shape of one sample and how it is encoded."""

    shape: tuple[int, ...]
    encoding: str


class Cache(_Frozen):
    """One teacher's part of the artifact."""

    address: Address
    num_samples: int = Field(ge=1)
    arrays: dict[str, Stored]

    @property
    def num_shards(self) -> int:
        """How many shards a whole cache has."""
        return -(-self.num_samples // self.address.per_shard)

    def rows(self, number: int) -> int:
        """Samples in one shard."""
        return min(self.address.per_shard, self.num_samples - number * self.address.per_shard)


class Share(_Frozen):
    """Which part of the shards an artifact holds: shards number - 1, number - 1 + of, ..."""

    number: int = Field(ge=1)
    of: int = Field(ge=1)


class Index(_Frozen):
    """The content of `index.json`; `share` is None where all shards are there."""

    caches: tuple[Cache, ...]
    share: Share | None = None


def read_index(artifact: Artifact) -> Index:
    """Index of an opened FEATURES.

    Raises:
        ArtifactError: this version cannot read it.
    """
    body = artifact.json(INDEX)
    if not isinstance(body, dict) or "caches" not in body:
        raise ArtifactError("is a feature cache of another version", where=artifact.path(INDEX), fix=REBUILD)
    return validate(Index, body, where=artifact.path(INDEX))


def digest_of_ids(samples: Samples) -> str:
    """sha256 over the samples' names, in order."""
    return hashlib.sha256(canonical(list(samples.ids))).hexdigest()


def shard_name(key: str, number: int) -> str:
    """Payload name of one shard."""
    return f"features/{key}/{number:05d}.safetensors"


def basis_name(key: str) -> str:
    """Payload name of the components of a cache with PCA."""
    return f"features/{key}/basis.safetensors"

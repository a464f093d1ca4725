"""Reading a FEATURES artifact: one teacher's logits and maps by sample number, from memory maps.

`CacheReader.open(..., teacher=T)` selects the sub-cache of T; several teachers are several readers over one artifact.
Distillation needs `batch` (float arrays by name) and `shapes`; how arrays are stored is known to nobody else.

Legend: B batch, S samples of one shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fmdeploy.artifact import Artifact
from fmdeploy.errors import ArtifactError, ConfigError
from fmdeploy.task import Array, Arrays, Samples
from fmdeploy.teacher.caching.finish import cache_encodings
from fmdeploy.teacher.caching.index import REBUILD, Cache, basis_name, digest_of_ids, read_index, shard_name
from fmdeploy.teacher.caching.shardfile import map_noted
from fmdeploy.teacher.caching.shardfile import map_safetensors as map_safetensors
from fmdeploy.teacher.encodings.base import Encoding, stored_name


@dataclass(frozen=True)
class CacheReader:
    """Random access to what one teacher said.

    Attributes:
        cache: What it holds: address, number of samples, arrays.
        encodings: Name of an array (`bev`, `scene`, `feature.tokens`) → how it is stored.
        shards: For each shard, stored name → (S, ...) array over the mapped file; encoded, see `batch`.
    """

    cache: Cache
    encodings: Mapping[str, Encoding]
    shards: Sequence[Arrays]

    @classmethod
    def open(cls, artifact: Artifact, *, teacher: Artifact | str, data: str, split: str, samples: Samples,
             preprocessing: str, task_source: str | None = None) -> CacheReader:
        """Map the shards of `artifact`, if they are what this teacher says about these samples.

        Args:
            artifact: An opened (so verified) FEATURES; it may hold other teachers too.
            teacher: The teacher the student learns from, or its digest.
            data: Digest of the dataset.
            split: Which split is trained on.
            samples: Its samples.
            preprocessing: Digest of the task's `io`.
            task_source: Hash of the code of a user's own task; None for a built-in one.

        Raises:
            ArtifactError: it was made from another teacher, dataset, split, preprocessing or by other code of the task;
                it is only a part; a shard is not what the index says.
        """
        digest = teacher if isinstance(teacher, str) else teacher.digest
        cache = _chosen(artifact, digest)
        wanted = {"data": data, "split": split, "preprocessing": preprocessing, "samples": digest_of_ids(samples)}
        for key, value in wanted.items():
            _require(artifact, key, value, getattr(cache.address, key))
        _require(artifact, "code of the task", task_source or "none", cache.address.task_source or "none")
        return cls.of(artifact, cache)

    @classmethod
    def of(cls, artifact: Artifact, cache: Cache) -> CacheReader:
        """Map one sub-cache, whoever its teacher is.

        Raises:
            ArtifactError: a shard is not what the index says.
        """
        key = cache.address.key
        try:
            encodings = cache_encodings(artifact.root / basis_name(key), cache)
        except ConfigError as error:
            raise ArtifactError(f"is stored in a way that this version cannot read: {error}", where=artifact.root,
                                fix=REBUILD) from error
        return cls(cache, encodings, [_shard(artifact, cache, encodings, n) for n in range(cache.num_shards)])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of one sample's decoded array, without the batch axis."""
        return {name: encoding.shape for name, encoding in self.encodings.items()}

    def __len__(self) -> int:
        return self.cache.num_samples

    def batch(self, index: Array) -> Arrays:
        """Decoded arrays (B, ...) of the samples `index` (B,): `bev`, `scene`, `feature.<layer>` and the like.

        Logits come back as logits and features as maps (B, D, h, w), float16 where that is what is stored, else
        float32. The arrays are the caller's: writable, C-ordered and nobody else's.

        Raises:
            IndexError: there is no such sample.
        """
        if len(index) and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"samples {index.min()} … {index.max()} of {len(self)}")
        places = [divmod(number, self.cache.address.per_shard) for number in index.tolist()]
        return {name: self._decoded(name, encoding, places) for name, encoding in self.encodings.items()}

    def _decoded(self, name: str, encoding: Encoding, places: Sequence[tuple[int, int]]) -> Array:
        return encoding.decode({part: self._gather(stored_name(name, part), places) for part in encoding.parts()})

    def _gather(self, name: str, places: Sequence[tuple[int, int]]) -> Array:
        """Rows of the mapped shards, each copied once."""
        columns = [shard[name] for shard in self.shards]
        found = np.empty((len(places), *columns[0].shape[1:]), columns[0].dtype)
        for at, (shard, row) in enumerate(places):
            found[at] = columns[shard][row]
        return found


def _chosen(artifact: Artifact, teacher: str) -> Cache:
    index = read_index(artifact)
    if index.share is not None:
        raise ArtifactError("is only a part of a feature cache", where=artifact.root, expected="all shards",
                            found=f"{index.share.number}/{index.share.of}", fix="Join the parts: fmdeploy cache-merge")
    digests = [cache.address.teacher for cache in index.caches]
    if teacher not in digests:
        _require(artifact, "teacher", teacher, ", ".join(digest[:12] for digest in digests))
    return index.caches[digests.index(teacher)]


def _require(artifact: Artifact, key: str, wanted: str, found: str) -> None:
    if wanted != found:
        raise ArtifactError(
            f"the cache is stale or foreign: it was made from another {key}", where=artifact.root,
            expected=wanted[:12], found=found if key == "teacher" else found[:12], fix=REBUILD,
        )


def _shard(artifact: Artifact, cache: Cache, encodings: Mapping[str, Encoding], number: int) -> Arrays:
    """The mapped arrays of one shard, held against the index.

    Raises:
        ArtifactError: it belongs elsewhere, lacks an array, has one of another type or shape, or a scale is not finite.
    """
    path = artifact.path(shard_name(cache.address.key, number))
    arrays, note = map_noted(path)
    found = (note["key"], note["shard"])
    if found != (cache.address.key, number):
        raise ArtifactError("is a shard of another cache", where=path, fix=REBUILD,
                            expected=f"{cache.address.key} shard {number}", found=f"{found[0]} shard {found[1]}")
    for name, encoding in encodings.items():
        for part, (dtype, shape) in encoding.parts().items():
            key, wanted = stored_name(name, part), (dtype, (cache.rows(number), *shape))
            if key not in arrays or (arrays[key].dtype, arrays[key].shape) != wanted:
                raise ArtifactError(
                    f"{key} is not what the index says", where=path, expected=f"{dtype}{list(wanted[1])}", fix=REBUILD,
                    found=f"{arrays[key].dtype}{list(arrays[key].shape)}" if key in arrays else "none",
                )
            if part in encoding.guarded and not np.isfinite(arrays[key]).all():
                raise ArtifactError(f"{key} holds a number that is not finite", where=path, fix=REBUILD)
    return arrays

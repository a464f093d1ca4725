"""`cache-merge`: the parts that several machines made, put together into what one machine would have written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.command import command
from fmdeploy.config import InputPath, OutputPath, Positional, StageConfig
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ArtifactError
from fmdeploy.manifest import Kind
from fmdeploy.teacher.caching.finish import finish, shard_numbers
from fmdeploy.teacher.caching.index import Cache, Index, Share, basis_name, read_index, shard_name
from fmdeploy.teacher.caching.reuse import link_or_copy
from fmdeploy.teacher.caching.shardfile import map_noted

AGAIN = "Write it with: fmdeploy cache --shard i/n, with the same options on every machine"


class MergeConfig(StageConfig):
    """What is joined."""

    parts: Annotated[tuple[InputPath, ...], Positional()] = Field(min_length=1, description="FEATURES of every share")
    out: OutputPath = Field(description="Where the whole FEATURES is written")


class _AsAsked(StageConfig):
    """The configuration of the parts without their share: the request that one machine would have been given."""

    asked: dict[str, Any]

    def resolved(self) -> dict[str, Any]:
        """As `cache` itself would have resolved it."""
        return self.asked


@command(MergeConfig)
def merge(config: MergeConfig) -> Artifact:
    """Join the parts of a feature cache; payload and digest are those of a single run.

    Files are linked where the file system allows it.

    Raises:
        ArtifactError: a part is missing, given twice or foreign.
    """
    parts = [open_artifact(path, Kind.FEATURES) for path in config.parts]
    found = {artifact.root: read_index(artifact) for artifact in parts}
    shares = [_share(artifact, found[artifact.root]) for artifact in parts]
    first = parts[0]
    for artifact in parts[1:]:
        _require_kin(first, found[first.root], artifact, found[artifact.root])
    _require_all(parts, shares)
    asked = {**first.manifest.config, "shard": ""}
    return produce(
        config.out, Kind.FEATURES, stage=first.manifest.stage, config=_AsAsked(asked=asked), inputs=first.inputs,
        build=lambda draft: _build(draft, parts, shares, found[first.root].caches),
    )


def _share(artifact: Artifact, index: Index) -> Share:
    if index.share is None:
        raise ArtifactError("is no part but a whole feature cache", where=artifact.root, fix=AGAIN)
    return index.share


def _require_kin(first: Artifact, ours: Index, other: Artifact, theirs: Index) -> None:
    """Refuse a part of another cache.

    Raises:
        ArtifactError: with what differs.
    """
    if ours.share is not None and theirs.share is not None and ours.share.of != theirs.share.of:
        raise ArtifactError("is a foreign part: it was cut into another number of shares", where=other.root,
                            expected=ours.share.of, found=theirs.share.of, fix=AGAIN)
    keys, others = ([cache.address.key for cache in index.caches] for index in (ours, theirs))
    if keys != others:
        difference = _difference(ours.caches, theirs.caches)
        raise ArtifactError(f"is a foreign part: {difference}", where=other.root, fix=AGAIN)
    for cache, twin in zip(ours.caches, theirs.caches, strict=True):
        name = basis_name(cache.address.key)
        if cache != twin or first.manifest.files.get(name) != other.manifest.files.get(name):
            raise ArtifactError("is a foreign part: its components or its arrays are not those of the others",
                                where=other.root, fix="Write it again with --reuse of the first part, whose components "
                                "it then takes: two kinds of machine round differently")


def _difference(ours: Sequence[Cache], theirs: Sequence[Cache]) -> str:
    if len(ours) != len(theirs):
        return f"it holds {len(theirs)} teachers, not {len(ours)}"
    for cache, other in zip(ours, theirs, strict=True):
        mine, its = cache.address.model_dump(), other.address.model_dump()
        if changed := sorted(key for key in mine if mine[key] != its[key]):
            return f"it was made with another {', '.join(changed)}"
    return "its samples are others"


def _require_all(parts: Sequence[Artifact], shares: Sequence[Share]) -> None:
    """Every share once.

    Raises:
        ArtifactError: one is missing or given twice.
    """
    seen: dict[int, Artifact] = {}
    for artifact, share in zip(parts, shares, strict=True):
        if share.number in seen:
            raise ArtifactError(f"the part {share.number}/{share.of} is given twice", where=artifact.root,
                                found=seen[share.number].root, fix="Name each part once")
        seen[share.number] = artifact
    if missing := sorted(set(range(1, shares[0].of + 1)) - set(seen)):
        raise ArtifactError(f"the part {missing[0]}/{shares[0].of} is missing", where=parts[0].root.parent, fix=AGAIN)


def _build(draft: Draft, parts: Sequence[Artifact], shares: Sequence[Share], caches: Sequence[Cache]) -> None:
    for cache in caches:
        key = cache.address.key
        if parts[0].has(basis_name(key)):
            link_or_copy(parts[0].path(basis_name(key)), draft.path(basis_name(key)))
        for artifact, share in zip(parts, shares, strict=True):
            for number in shard_numbers(cache.num_shards, share):
                _take(artifact, cache, number, draft)
    finish(draft, [cache.address for cache in caches], caches[0].num_samples, None)


def _take(artifact: Artifact, cache: Cache, number: int, draft: Draft) -> None:
    """Link one shard that is what its name says."""
    name = shard_name(cache.address.key, number)
    note = map_noted(artifact.path(name))[1]
    if (note["key"], note["shard"]) != (cache.address.key, number):
        raise ArtifactError("is a shard of another cache", where=artifact.path(name), fix=AGAIN)
    link_or_copy(artifact.path(name), draft.path(name))

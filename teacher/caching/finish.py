"""What closes a FEATURES: its index and its numbers, both read from the headers of the shards that are there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fmdeploy.draft import Draft
from fmdeploy.teacher.caching.index import (
    INDEX,
    METRICS,
    Address,
    Cache,
    Index,
    Share,
    Stored,
    basis_name,
    shard_name,
)
from fmdeploy.teacher.caching.roundtrip import summary
from fmdeploy.teacher.caching.shardfile import map_noted, map_safetensors
from fmdeploy.teacher.encodings.base import Encoding, state_of
from fmdeploy.teacher.encodings.registry import make, read_feature, read_output
from fmdeploy.teacher.view import FEATURE


def shard_numbers(num_shards: int, share: Share | None) -> range:
    """The shards of a whole cache, or of one share of it."""
    return range(share.number - 1, num_shards, share.of) if share else range(num_shards)


def finish(draft: Draft, addresses: Sequence[Address], num_samples: int, share: Share | None) -> None:
    """Write `index.json` and `metrics.json`: the same ones, whoever has made the shards."""
    caches, numbers, size = [], {}, 0
    for address in addresses:
        cache = Cache(address=address, num_samples=num_samples, arrays={})
        shards = shard_numbers(cache.num_shards, share)
        notes = [_note(draft, address, number) for number in shards]
        arrays = {name: Stored(shape=tuple(each["shape"]), encoding=each["encoding"])
                  for name, each in sorted(notes[0]["arrays"].items())}
        cache = cache.model_copy(update={"arrays": arrays})
        caches.append(cache)
        encodings = cache_encodings(draft.root / basis_name(address.key), cache)
        numbers[address.teacher[:12]] = {name: {"encoding": arrays[name].encoding,
                                                **summary((note["sums"][name] for note in notes), encodings[name])}
                                         for name in arrays}
        size += _bytes(draft, [shard_name(address.key, number) for number in shards] + [basis_name(address.key)])
    samples = sum(caches[0].rows(number) for number in shard_numbers(caches[0].num_shards, share))
    draft.write_json(INDEX, Index(caches=tuple(caches), share=share).model_dump(mode="json"))
    draft.write_json(METRICS, {"samples": samples, "bytes": size, "bytes_per_sample": size / samples,
                               "teachers": numbers})


def cache_encodings(basis: Path, cache: Cache) -> dict[str, Encoding]:
    """The encoding of each array of a cache; `basis` is the path of its components, where there are any.

    Raises:
        ArtifactError: the components do not fit.
        ConfigError: an encoding that this version does not know.
    """
    stored = map_safetensors(basis) if basis.is_file() else {}
    found = {}
    for name, array in cache.arrays.items():
        is_feature = name.startswith(FEATURE)
        spelling = read_feature(array.encoding) if is_feature else read_output(array.encoding)
        found[name] = make(name, spelling, array.shape, is_feature=is_feature, state=state_of(stored, name))
    return found


def _note(draft: Draft, address: Address, number: int) -> dict[str, Any]:
    return map_noted(draft.path(shard_name(address.key, number)))[1]


def _bytes(draft: Draft, names: Iterable[str]) -> int:
    return sum((draft.root / name).stat().st_size for name in names if (draft.root / name).is_file())

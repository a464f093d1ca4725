"""Bring your own data: a DATASET from plain arrays."""

# N samples

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.artifact import Artifact
from fmdeploy.config import OutputPath, StageConfig
from fmdeploy.data.writer import DatasetWriter
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import DataError, LeakageError
from fmdeploy.manifest import Kind


class WriteArraysConfig(StageConfig):
    """Says which arrays a hand-made dataset came from; the digest covers the content itself."""

    out: OutputPath
    name: str = "arrays"
    content: str = ""


def write_arrays(
    out: Path | str,
    arrays: Mapping[str, Array],
    splits: Mapping[str, Array],
    *,
    groups: Array | None = None,
    name: str = "arrays",
) -> Artifact:
    """Bring your own data: a DATASET from plain arrays with a leading sample axis.

    Args:
        out: Target directory.
        arrays: Name → (N, ...) array; inputs by the names in the task's `io`, targets and slices beside them.
        splits: Split name → sample numbers (disjoint).
        groups: (N,) samples with equal values belong together (one drive, one person); default: each alone.
        name: A label for the manifest.

    Raises:
        DataError: the arrays have different numbers of samples.
        LeakageError: a group stands in two splits.
    """
    count = len(next(iter(arrays.values())))
    for key, array in arrays.items():
        if len(array) != count:
            raise DataError(f"the array {key!r} has another number of samples", where=out, expected=count,
                            found=len(array))
    group = np.arange(count) if groups is None else np.asarray(groups)
    _refuse_torn_groups(group, splits, out)
    config = WriteArraysConfig(out=Path(out), name=name, content=_digest({**arrays, "": group, **splits}))

    def build(draft: Draft) -> None:
        writer = DatasetWriter(draft, per_shard=1024)
        named: dict[str, list[str]] = {split: [] for split in splits}
        for split, numbers in splits.items():
            for value in np.unique(group[numbers]):
                rows = np.asarray(numbers)[group[numbers] == value]
                sequence = f"{split}-{value}"
                writer.add(sequence, {k: np.asarray(v)[rows] for k, v in arrays.items()}, {"simulation": str(value)})
                named[split].append(sequence)
        writer.close(named)

    return produce(Path(out), Kind.DATASET, stage="data arrays", config=config, inputs={}, build=build)


def _refuse_torn_groups(group: Array, splits: Mapping[str, Array], where: object) -> None:
    for one, other in combinations(splits, 2):
        if len(shared := np.intersect1d(group[splits[one]], group[splits[other]])):
            raise LeakageError(f"the group {shared[0]} is in both {one} and {other}", where=where,
                               found=f"{len(shared)} such groups", fix="Split by group")


def _digest(arrays: Mapping[str, Array]) -> str:
    """sha256 over names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        plain = np.ascontiguousarray(array)
        sha.update(f"{name} {plain.dtype.str} {plain.shape}\n".encode())
        sha.update(plain.tobytes())
    return sha.hexdigest()

"""Bring your own data: a DATASET from plain arrays."""

# N samples

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fmdeploy.artifact import Artifact
from fmdeploy.config import OutputPath, StageConfig
from fmdeploy.data.writer import DatasetWriter, npz_bytes
from fmdeploy.draft import Draft, produce
from fmdeploy.manifest import Kind


class WriteArraysConfig(StageConfig):
    """Says which arrays a hand-made dataset came from; the digest covers the content itself."""

    out: OutputPath
    name: str = "arrays"
    content: str = ""


def write_arrays(
    out: Path | str,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    splits: Mapping[str, np.ndarray[Any, Any]],
    *,
    groups: np.ndarray[Any, Any] | None = None,
    name: str = "arrays",
) -> Artifact:
    """Bring your own data: a DATASET from plain arrays with a leading sample axis.

    Args:
        out: Target directory.
        arrays: Name → (N, ...) array; inputs by the names in the task's `io`, targets and slices beside them.
        splits: Split name → sample numbers (disjoint).
        groups: (N,) samples with equal values belong together (one drive, one person); default: each alone.
        name: A label for the manifest.
    """
    count = len(next(iter(arrays.values())))
    group = np.arange(count) if groups is None else groups
    content = hashlib.sha256(npz_bytes({**arrays, "fmdeploy_group": group,
                                        **{f"fmdeploy_split_{k}": v for k, v in splits.items()}})).hexdigest()
    config = WriteArraysConfig(out=Path(out), name=name, content=content)

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

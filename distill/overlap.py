"""Whether a teacher saw what the student will be judged on.

A teacher of the student's own dataset was trained on its train split, whose simulations are nowhere else. One that
comes from another dataset may have been trained on the student's test scenes: the manifest names that dataset by its
digest only, so the dataset itself must be shown to compare the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from fmdeploy.artifact import Artifact
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.errors import ConfigError, LeakageError
from fmdeploy.manifest import Kind, Parent
from fmdeploy.progress import say

HELD_OUT = ("val", "test")


def check_training_data(sources: Sequence[Artifact], data: Dataset, shown: Sequence[Path]) -> dict[str, str]:
    """Compare what `sources` were trained on with the held-out splits of `data`.

    Args:
        sources: Teachers, and the student to start from.
        data: The student's dataset.
        shown: Other datasets that they were trained on.

    Returns:
        Digest of each other dataset in their lineage → `disjoint`, or `not checked` (also said aloud).

    Raises:
        LeakageError: a simulation or a recording that they were trained on is in a held-out split of `data`.
        ConfigError: a dataset was shown that none of them was trained on.
    """
    foreign = {digest for source in sources for digest in _datasets(source.inputs)} - {data.digest}
    found = dict.fromkeys(sorted(foreign), "not checked")
    for path in shown:
        other = open_dataset(path)
        if other.digest not in foreign:
            raise ConfigError("no teacher was trained on this dataset", where=f"teacher_data {path}",
                              expected=" or ".join(digest[:12] for digest in sorted(foreign)) or "none",
                              found=other.digest[:12])
        _require_disjoint(other, data)
        found[other.digest] = "disjoint"
    for digest, state in found.items():
        if state != "disjoint":
            say(f"a teacher was trained on dataset {digest[:12]} too, which may hold scenes that the student is judged "
                "on: show it with --teacher-data to have it checked")
    return found


def _datasets(parents: Mapping[str, Parent]) -> Iterator[str]:
    """Digests of what was read; not of what such a dataset was split or joined from, whose splits nobody trained on."""
    for parent in parents.values():
        if parent.kind is Kind.DATASET:
            yield parent.digest
        else:
            yield from _datasets(parent.inputs)


def _require_disjoint(other: Dataset, data: Dataset) -> None:
    """Compare by simulation, and by the bytes of each recording, which no new name hides."""
    held_out = [(split, sequence) for split in HELD_OUT if data.splits.get(split) for sequence in data.split(split)]
    trained = other.split("train")
    groups = {sequence.group for sequence in trained}
    contents = {content_digest(other, sequence) for sequence in trained}
    same = [(split, sequence) for split, sequence in held_out
            if sequence.group in groups or content_digest(data, sequence) in contents]
    if same:
        split, sequence = same[0]
        raise LeakageError(
            f"the teacher was trained on {len(same)} of the sequences that the student is judged on",
            where=other.artifact.root, found=f"{sequence.id} of {split}, simulation {sequence.group}",
            expected="none", fix="Take a teacher that was trained on other simulations",
        )


def content_digest(data: Dataset, sequence: SequenceInfo) -> str:
    """sha256 over the names, types and bytes of a sequence's arrays."""
    found = hashlib.sha256()
    for name, array in sorted(data.arrays(sequence).items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()

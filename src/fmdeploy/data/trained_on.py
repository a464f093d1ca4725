"""Whether a network that a run builds on was trained on what the run is judged on.

A network that was trained on the run's own dataset saw its train split, whose simulations are nowhere else. One that
comes from another dataset may have been trained on the test scenes: its manifest names that dataset by its digest only,
so the dataset itself must be shown to compare the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, field_validator

from fmdeploy.artifact import Artifact
from fmdeploy.config import InputPath, StageConfig
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.leakage import simulation_of
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.errors import ConfigError, LeakageError
from fmdeploy.manifest import datasets_read
from fmdeploy.progress import say

HELD_OUT = ("val", "test")


class TrainedOnConfig(StageConfig):
    """Options of stages that build on networks which others trained."""

    teacher_data: tuple[InputPath, ...] = Field(default=(), description=(
        "DATASET that a teacher or --init was trained on, where it is not --data: refused if it holds what this run "
        "is judged on; repeatable"))

    @field_validator("teacher_data", mode="before")
    @classmethod
    def _one_or_several_datasets(cls, value: Any) -> Any:
        return tuple(() if value is None else (value,) if isinstance(value, str | Path) else value)


def check_training_data(
    sources: Sequence[Artifact], data: Dataset, shown: Sequence[Path], given: Sequence[Dataset] = ()
) -> dict[str, str]:
    """Compare what `sources` were trained on with the held-out splits of `data`.

    Args:
        sources: Teachers, and the network to start from.
        data: The run's dataset.
        shown: Other datasets that they were trained on.
        given: Datasets that the run reads for another reason: each counts as shown if one of them was trained on it.

    Returns:
        Digest of each other dataset in their lineage → `disjoint`, or `not checked` (also said aloud).

    Raises:
        LeakageError: a simulation or a recording that they were trained on is in a held-out split of `data`.
        ConfigError: a dataset was shown that none of them was trained on, or the run's own.
    """
    foreign = {read.digest for source in sources for read in datasets_read(source.inputs)} - {data.digest}
    known = {other.digest: other for other in (*given, *(_shown(path, foreign, data) for path in shown))}
    known = {digest: other for digest, other in known.items() if digest in foreign}
    held_out = _held_out(data) if known else []
    for other in known.values():
        _require_disjoint(other, held_out)
    for digest in sorted(foreign - set(known)):
        say(f"a network in the lineage was trained on dataset {digest[:12]} too, which may hold scenes that this run "
            "is judged on: show it with --teacher-data to have it checked")
    return {digest: "disjoint" if digest in known else "not checked" for digest in sorted(foreign)}


def _shown(path: Path, foreign: set[str], data: Dataset) -> Dataset:
    other = open_dataset(path)
    if other.digest == data.digest:
        raise ConfigError("is the dataset of this run, whose splits are disjoint", where=f"teacher_data {path}",
                          expected="another dataset that a network was trained on", fix="Leave it out")
    if other.digest not in foreign:
        raise ConfigError("nothing that this run builds on was trained on this dataset", where=f"teacher_data {path}",
                          expected=" or ".join(digest[:12] for digest in sorted(foreign)) or "none",
                          found=other.digest[:12])
    return other


class _HeldOut(NamedTuple):
    """A sequence that the run is judged on."""

    split: str
    sequence: SequenceInfo
    content: str


def _held_out(data: Dataset) -> list[_HeldOut]:
    return [_HeldOut(split, sequence, content_digest(data, sequence))
            for split in HELD_OUT if data.splits.get(split) for sequence in data.split(split)]


def _require_disjoint(other: Dataset, held_out: Sequence[_HeldOut]) -> None:
    """Compare by simulation, and by the bytes of each recording, which no new name hides."""
    trained = other.split("train") if other.splits.get("train") else ()
    simulations = {simulation_of(sequence) for sequence in trained} - {None}
    contents = {content_digest(other, sequence) for sequence in trained}
    same = [row for row in held_out if simulation_of(row.sequence) in simulations or row.content in contents]
    if same:
        first = same[0]
        raise LeakageError(
            f"a network that this run builds on was trained on {len(same)} of the sequences that the run is judged on",
            where=other.artifact.root, found=f"{first.sequence.id} of {first.split}, simulation {first.sequence.group}",
            expected="none", fix="Take one that was trained on other simulations",
        )


def refuse_same_bytes(old: Dataset, data: Dataset) -> None:
    """Refuse to replay recordings that `data` holds out, of those whose name tells nothing (`simulation_of`).

    Raises:
        LeakageError: a recording in the train split of `old` has equal bytes.
    """
    nameless = [sequence for sequence in old.split("train") if simulation_of(sequence) is None]
    seen = {content_digest(old, sequence) for sequence in nameless}
    if same := [row for row in _held_out(data) if row.content in seen] if seen else []:
        raise LeakageError(f"holds {len(same)} of the sequences that --data is judged on, byte for byte",
                           where=old.artifact.root, found=f"{same[0].sequence.id} of {same[0].split}",
                           expected="other recordings", fix="Split both alike")


def content_digest(data: Dataset, sequence: SequenceInfo) -> str:
    """sha256 over the names, types and bytes of a sequence's arrays."""
    found = hashlib.sha256()
    for name, array in sorted(data.arrays(sequence).items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()

"""Whether a run, or a network that it builds on, is trained on what is held out.

A network that was trained on the run's own dataset saw its train split, whose simulations are nowhere else. One that
comes from another dataset may have been trained on the test scenes: its manifest names that dataset by its digest only,
so the dataset itself must be shown to compare the two. Of two datasets that a run reads, neither may train on what the
other holds out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from fmdeploy.artifact import Artifact
from fmdeploy.config import InputPath, StageConfig
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.leakage import simulation_of
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.errors import ConfigError, LeakageError
from fmdeploy.manifest import datasets_learnt_from
from fmdeploy.progress import say

HELD_OUT = ("val", "test")


class TrainedOnConfig(StageConfig):
    """Options of stages that build on networks which others trained."""

    teacher_data: tuple[InputPath, ...] = Field(default=(), description=(
        "DATASET, not --data, that a network which this run builds on was trained on: refused if it holds what this "
        "run is judged on; repeatable"))

    @field_validator("teacher_data", mode="before")
    @classmethod
    def _one_or_several_datasets(cls, value: Any) -> Any:
        return tuple(() if value is None else (value,) if isinstance(value, str | Path) else value)


def check_training_data(
    sources: Sequence[Artifact], data: Dataset, shown: Sequence[Path], *, replay: Sequence[Dataset] = (),
    judged: Sequence[Dataset] = (),
) -> dict[str, str]:
    """Compare what a run and its `sources` are trained on with what is held out.

    Args:
        sources: Teachers, and the network to start from.
        data: The run's dataset.
        shown: Other datasets that the sources were trained on.
        replay: Datasets that the run trains on besides.
        judged: Datasets that it is judged on besides. These and `replay` count as shown where a source was trained on
            one of them.

    Returns:
        Digest of each other dataset in the sources' lineage → `disjoint`, or `not checked` (also said aloud).

    Raises:
        LeakageError: a simulation or a recording that is trained on is held out.
        ConfigError: a dataset was shown that none of the sources was trained on, or the run's own.
    """
    contents = _Contents()
    _require_apart(contents, [data, *replay], [data, *replay, *judged])
    foreign = {read.digest for source in sources for read in datasets_learnt_from(source.inputs)} - {data.digest}
    known = {other.digest: other for other in (*replay, *judged, *(_shown(path, foreign, data) for path in shown))}
    known = {digest: other for digest, other in known.items() if digest in foreign}
    for other in known.values():
        _require_unseen(contents, other, [data, *judged])
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


def _require_apart(contents: _Contents, trained: Sequence[Dataset], judged: Sequence[Dataset]) -> None:
    """Of two datasets, compared by simulation, and by bytes where one has a recording whose name tells nothing."""
    for ours, theirs in product(trained, judged):
        nameless = any(simulation_of(sequence) is None for sequence in (*_train(ours), *_held_out(theirs)))
        if ours.digest != theirs.digest and (same := contents.shared(ours, theirs, by_bytes=nameless)):
            raise LeakageError(
                f"the train split holds {len(same)} of the sequences that {theirs.artifact.root} holds out",
                where=ours.artifact.root, found=_name(same[0], theirs), expected="other recordings",
                fix="Record one of them with another --seed, or split both alike")


def _require_unseen(contents: _Contents, other: Dataset, judged: Sequence[Dataset]) -> None:
    """Compare by simulation, and by the bytes of each recording, which no new name hides."""
    for theirs in judged:
        if other.digest != theirs.digest and (same := contents.shared(other, theirs, by_bytes=True)):
            raise LeakageError(
                f"a network that this run builds on was trained on {len(same)} of the sequences that the run is "
                "judged on", where=other.artifact.root, found=_name(same[0], theirs), expected="none",
                fix="Take one that was trained on other simulations")


def _name(sequence: SequenceInfo, data: Dataset) -> str:
    split = next(name for name in HELD_OUT if sequence.id in data.splits.get(name, ()))
    return f"{sequence.id} of {split}, simulation {sequence.group}"


def _train(data: Dataset) -> tuple[SequenceInfo, ...]:
    return data.split("train") if data.splits.get("train") else ()


def _held_out(data: Dataset) -> tuple[SequenceInfo, ...]:
    return tuple(s for split in HELD_OUT if data.splits.get(split) for s in data.split(split))


class _Contents:
    """Digests of recordings, each found once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], str] = {}

    def shared(self, trained: Dataset, judged: Dataset, *, by_bytes: bool) -> list[SequenceInfo]:
        """Held-out sequences of `judged` whose simulation, or whose bytes, are in the train split of `trained`."""
        simulations = {simulation_of(sequence) for sequence in _train(trained)} - {None}
        contents = {self._of(trained, sequence) for sequence in _train(trained)} if by_bytes else set()
        return [sequence for sequence in _held_out(judged) if simulation_of(sequence) in simulations
                or (contents and self._of(judged, sequence) in contents)]

    def _of(self, data: Dataset, sequence: SequenceInfo) -> str:
        key = data.digest, sequence.id
        if key not in self._known:
            self._known[key] = content_digest(data, sequence)
        return self._known[key]


def content_digest(data: Dataset, sequence: SequenceInfo) -> str:
    """sha256 over the names, types and bytes of a sequence's arrays."""
    found = hashlib.sha256()
    for name, array in sorted(data.arrays(sequence).items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()

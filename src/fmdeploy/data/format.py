"""The DATASET artifact: WebDataset tar shards of whole sequences, an index and the splits.

    shards/00000.tar   <sequence>.npz   arrays with a leading time axis (T, ...)
                       <sequence>.json  metadata of the sequence
    index.json         one record a sequence: id, shard, frames, metadata
    splits.json        split name → sequence ids

Tar members carry no time, owner or mode of the machine, so equal content gives equal bytes.
"""

# T frames of one sequence

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from fmdeploy.arrays import Arrays
from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.data.leakage import refuse_leaks
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.errors import DataError
from fmdeploy.manifest import Kind

SPLITS = ("train", "val", "test")
MAX_MEMBER_BYTES = 2**30


@dataclass
class Dataset:
    """An opened DATASET; arrays are read a shard at a time and kept for the next call."""

    artifact: Artifact
    sequences: tuple[SequenceInfo, ...]
    splits: dict[str, tuple[str, ...]]
    _shard: tuple[str, dict[str, Arrays]] = field(default=("", {}), repr=False)

    @property
    def digest(self) -> str:
        """Identity and version of the data."""
        return self.artifact.digest

    def split(self, name: str) -> tuple[SequenceInfo, ...]:
        """The sequences of `train`, `val` or `test`, or of all three (`all`), in index order.

        Raises:
            DataError: no such split, or it is empty.
        """
        known = [*self.splits, "all"]
        if name not in known:
            raise DataError(f"no split {name!r}", where=self.artifact.root, expected=" or ".join(known))
        wanted = {i for ids in self.splits.values() for i in ids} if name == "all" else set(self.splits[name])
        chosen = tuple(s for s in self.sequences if s.id in wanted)
        if not chosen:
            raise DataError(f"the split {name!r} is empty", where=self.artifact.root, fix="Split it again: data split")
        return chosen

    def arrays(self, sequence: SequenceInfo) -> Arrays:
        """All arrays of one sequence, each (T, ...).

        Raises:
            DataError: the shard does not hold what the index says.
        """
        if self._shard[0] != sequence.shard:
            self._shard = (sequence.shard, read_shard(self.artifact.path(sequence.shard)))
        found = self._shard[1].get(sequence.id)
        if found is None:
            raise DataError(f"lacks the sequence {sequence.id}", where=self.artifact.path(sequence.shard))
        self._check_lengths(sequence, {name: array.shape for name, array in found.items()})
        return found

    def glances(
        self, sequences: Sequence[SequenceInfo], wanted: Callable[[str], bool]
    ) -> Iterator[tuple[SequenceInfo, Layout, Arrays]]:
        """Each sequence, the layout of all its arrays, and those that are `wanted` by name; a shard at a time.

        Raises:
            DataError: a shard does not hold what the index says, or cannot be read.
        """
        for shard, group in groupby(sequences, key=lambda sequence: sequence.shard):
            members = list(group)
            found = dict(_look(self.artifact.path(shard), [s.id for s in members], wanted))
            for sequence in members:
                layout, arrays = self._known(found, sequence)
                self._check_lengths(sequence, {name: shape for name, (_, shape) in layout.items()})
                yield sequence, layout, arrays

    def joined(self, sequences: Sequence[SequenceInfo], names: Collection[str]) -> Arrays:
        """The arrays `names` of sequences of one shard, one sequence behind the other; safe in any thread.

        Raises:
            DataError: the shard does not hold what the index says, or cannot be read.
        """
        path = self.artifact.path(sequences[0].shard)
        found = dict(_look(path, [s.id for s in sequences], names.__contains__))
        parts = [self._known(found, sequence)[1] for sequence in sequences]
        if lost := [name for name in names if any(name not in part for part in parts)]:
            raise DataError(f"lacks the array {lost[0]}", where=path)
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _known(self, found: Mapping[str, tuple[Layout, Arrays]], sequence: SequenceInfo) -> tuple[Layout, Arrays]:
        if sequence.id not in found:
            raise DataError(f"lacks the sequence {sequence.id}", where=self.artifact.path(sequence.shard))
        return found[sequence.id]

    def _check_lengths(self, sequence: SequenceInfo, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if bad := [name for name, shape in shapes.items() if shape[:1] != (sequence.frames,)]:
            raise DataError(f"{sequence.id}: {bad[0]} has another length", where=self.artifact.path(sequence.shard),
                            expected=sequence.frames, found=shapes[bad[0]])


def open_dataset(root: Path | str) -> Dataset:
    """Open and verify a DATASET.

    Raises:
        ArtifactError: it is not a DATASET or was altered.
        DataError: a sequence stands in two splits, or a split names an unknown one.
        LeakageError: sequences of one seed, simulation or recording stand in two splits.
    """
    data = open_unchecked(root)
    check_splits(data.splits, [s.id for s in data.sequences], data.artifact.root)
    refuse_leaks(data.sequences, data.splits, data.artifact.root)
    return data


def open_unchecked(root: Path | str) -> Dataset:
    """Open and verify a DATASET whatever its splits are like: for an audit, and to split it anew.

    Raises:
        ArtifactError: it is not a DATASET or was altered.
        DataError: its index or its splits have another form.
    """
    artifact = open_artifact(root, Kind.DATASET)
    try:
        sequences = tuple(SequenceInfo(**record) for record in artifact.json("index.json"))
        splits = {name: tuple(ids) for name, ids in artifact.json("splits.json").items()}
    except (TypeError, AttributeError) as error:
        raise DataError(f"the index or the splits have another form: {error}", where=artifact.root) from error
    for s in sequences:
        if not (isinstance(s.id, str) and isinstance(s.shard, str) and isinstance(s.metadata, dict)
                and type(s.frames) is int and s.frames >= 0):
            raise DataError("the index holds something that is no sequence", where=artifact.root, found=str(s)[:80])
    return Dataset(artifact, sequences, splits)


def check_splits(splits: Mapping[str, Sequence[str]], known: Sequence[str], where: object) -> None:
    """Refuse splits that overlap or name sequences that are not there.

    Raises:
        DataError: with the first offender.
    """
    seen: dict[str, str] = {}
    for name, ids in splits.items():
        for sequence in ids:
            if sequence in seen:
                raise DataError(f"the sequence {sequence} is in both {seen[sequence]} and {name}", where=where)
            seen[sequence] = name
    if unknown := sorted(set(seen) - set(known)):
        raise DataError(f"the splits name an unknown sequence: {unknown[0]}", where=where)


def read_shard(path: Path) -> dict[str, Arrays]:
    """All sequences of one tar shard: id → arrays.

    Raises:
        DataError: the tar or one of its members cannot be read.
    """
    return {name: arrays for name, (_, arrays) in _look(path, None, lambda name: True)}


Layout = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
"""Name of an array → its dtype and shape."""


def _look(
    path: Path, ids: Collection[str] | None, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, tuple[Layout, Arrays]]]:
    """Of every sequence of a shard (or of those in `ids`) the layout of its arrays, and the arrays that are wanted."""
    known = None if ids is None else frozenset(ids)
    try:
        with tarfile.open(path, "r:") as tar:
            for name, npz in _npz_members(tar, known):
                arrays = {key: npz[key] for key in npz.files if wanted(key)}
                # Arrays that nobody wants are not unpacked: their first bytes say what they are.
                layout = {key: (arrays[key].dtype, arrays[key].shape) if key in arrays else _header(npz, key)
                          for key in npz.files}
                yield name, (layout, arrays)
    except (tarfile.TarError, zipfile.BadZipFile, ValueError, EOFError, OSError, KeyError) as error:
        raise DataError(f"cannot be read as a shard: {error}", where=path) from error


def _header(npz: Any, key: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    with npz.zip.open(f"{key}.npy") as stream:
        if np.lib.format.read_magic(stream) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    if dtype.hasobject:
        raise ValueError(f"{key} is an object array")
    return dtype, shape


def _npz_members(tar: tarfile.TarFile, ids: Collection[str] | None) -> Iterator[tuple[str, Any]]:
    for member in tar:
        if not member.isfile() or not member.name.endswith(".npz"):
            continue
        if ids is not None and Path(member.name).stem not in ids:
            continue
        if member.size > MAX_MEMBER_BYTES:
            raise ValueError(f"{member.name} is larger than {MAX_MEMBER_BYTES} bytes")
        stream = tar.extractfile(member)
        assert stream is not None
        content = stream.read()
        bound_unpacked(content, member.name)
        with np.load(io.BytesIO(content), allow_pickle=False) as npz:
            yield Path(member.name).stem, npz


def bound_unpacked(content: bytes, name: str) -> None:
    """Refuse an npz that unpacks to more than the bound: 256 MiB of zeros pack into a quarter of a megabyte."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MAX_MEMBER_BYTES:
        raise ValueError(f"{name} unpacks to {unpacked} bytes, at most {MAX_MEMBER_BYTES} are read")

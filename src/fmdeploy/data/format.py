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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
        if bad := [k for k, v in found.items() if v.shape[:1] != (sequence.frames,)]:
            raise DataError(f"{sequence.id}: {bad[0]} has another length", where=self.artifact.path(sequence.shard),
                            expected=sequence.frames, found=found[bad[0]].shape)
        return found


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
    """
    artifact = open_artifact(root, Kind.DATASET)
    sequences = tuple(SequenceInfo(**record) for record in artifact.json("index.json"))
    return Dataset(artifact, sequences, {name: tuple(ids) for name, ids in artifact.json("splits.json").items()})


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
    try:
        with tarfile.open(path, "r:") as tar:
            return {Path(name).stem: arrays for name, arrays in _npz_members(tar)}
    except (tarfile.TarError, zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise DataError(f"cannot be read as a shard: {error}", where=path) from error


def _npz_members(tar: tarfile.TarFile) -> Iterator[tuple[str, Arrays]]:
    for member in tar:
        if not member.isfile() or not member.name.endswith(".npz"):
            continue
        if member.size > MAX_MEMBER_BYTES:
            raise ValueError(f"{member.name} is larger than {MAX_MEMBER_BYTES} bytes")
        stream = tar.extractfile(member)
        assert stream is not None
        content = stream.read()
        _bound_unpacked(content, member.name)
        with np.load(io.BytesIO(content), allow_pickle=False) as npz:
            yield member.name, {key: npz[key] for key in npz.files}


def _bound_unpacked(content: bytes, name: str) -> None:
    """Refuse an npz that unpacks to more than the bound: 256 MiB of zeros pack into a quarter of a megabyte."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MAX_MEMBER_BYTES:
        raise ValueError(f"{name} unpacks to {unpacked} bytes, at most {MAX_MEMBER_BYTES} are read")

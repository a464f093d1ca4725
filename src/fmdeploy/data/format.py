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
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fmdeploy.arrays import Arrays
from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.config import OutputPath, StageConfig
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import DataError
from fmdeploy.manifest import Kind

SPLITS = ("train", "val", "test")
SEQUENCES_PER_SHARD = 64
ID_PATTERN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
MAX_MEMBER_BYTES = 2**30
ZIP_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class SequenceInfo:
    """One continuous recording."""

    id: str
    shard: str
    frames: int
    metadata: Mapping[str, Any]

    @property
    def group(self) -> str:
        """Sequences of one group are not independent; they stay in one split."""
        return str(self.metadata.get("simulation", self.id))


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
    """
    artifact = open_artifact(root, Kind.DATASET)
    sequences = tuple(SequenceInfo(**record) for record in artifact.json("index.json"))
    splits = {name: tuple(ids) for name, ids in artifact.json("splits.json").items()}
    check_splits(splits, [s.id for s in sequences], artifact.root)
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


class DatasetWriter:
    """Writes the payload of a DATASET into a draft. Sequences are stored in the order of `add`."""

    def __init__(self, draft: Draft, *, per_shard: int = SEQUENCES_PER_SHARD) -> None:
        self.draft, self.per_shard = draft, per_shard
        self.index: list[dict[str, Any]] = []
        self._tar: tarfile.TarFile | None = None

    def add(self, sequence: str, arrays: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, Any]) -> None:
        """Append one sequence; every array is (T, ...).

        Raises:
            DataError: the id cannot be a file name or repeats, an array is of dtype object, or lengths differ.
        """
        lengths = {name: array.shape[0] for name, array in arrays.items() if array.ndim}
        if not ID_PATTERN.match(sequence) or any(r["id"] == sequence for r in self.index[-1:]):
            raise DataError("is not a usable, unique sequence id", where=repr(sequence), expected=ID_PATTERN.pattern)
        if len(lengths) != len(arrays) or len(set(lengths.values())) != 1:
            raise DataError("arrays must share a leading time axis", where=sequence, found=lengths)
        if bad := [n for n, a in arrays.items() if a.dtype.hasobject]:
            raise DataError(f"{bad[0]} is an object array", where=sequence)
        shard = f"shards/{len(self.index) // self.per_shard:05d}.tar"
        if len(self.index) % self.per_shard == 0:
            self._open(shard)
        assert self._tar is not None
        _add_member(self._tar, f"{sequence}.npz", npz_bytes(arrays))
        _add_member(self._tar, f"{sequence}.json", json.dumps(dict(metadata), sort_keys=True).encode())
        frames = next(iter(lengths.values()))
        self.index.append({"id": sequence, "shard": shard, "frames": frames, "metadata": dict(metadata)})

    def close(self, splits: Mapping[str, Sequence[str]]) -> None:
        """Write the index, the splits and the counts.

        Raises:
            DataError: the splits overlap or name an unknown sequence, or there is no sequence at all.
        """
        if self._tar is not None:
            self._tar.close()
        if not self.index:
            raise DataError("the dataset has no sequences", where=self.draft.root.name)
        known = [record["id"] for record in self.index]
        if len(set(known)) != len(known):
            raise DataError("sequence ids repeat", where=self.draft.root.name)
        check_splits(splits, known, "splits")
        write_index(self.draft, self.index, splits)

    def _open(self, shard: str) -> None:
        if self._tar is not None:
            self._tar.close()
        self._tar = tarfile.open(self.draft.path(shard), "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - open across calls


def write_index(draft: Draft, index: list[dict[str, Any]], splits: Mapping[str, Sequence[str]]) -> None:
    """Write `index.json`, `splits.json` and the counts in `metrics.json`."""
    frames = {record["id"]: record["frames"] for record in index}
    counts = {name: {"sequences": len(ids), "frames": sum(frames[i] for i in ids)} for name, ids in splits.items()}
    draft.write_json("index.json", index)
    draft.write_json("splits.json", {name: list(ids) for name, ids in splits.items()})
    draft.write_json("metrics.json", {"sequences": len(index), "frames": sum(frames.values()), "splits": counts})


def npz_bytes(arrays: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """A deflated npz whose bytes depend on the arrays alone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in sorted(arrays):
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(arrays[name]), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", ZIP_TIME)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, member.getvalue())
    return buffer.getvalue()


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
        with np.load(io.BytesIO(stream.read()), allow_pickle=False) as npz:
            yield member.name, {key: npz[key] for key in npz.files}


def _add_member(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(payload), 0o644
    tar.addfile(info, io.BytesIO(payload))


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
    import hashlib

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

"""Writing a DATASET's payload: shards whose bytes depend on the sequences alone, index and splits."""

# T frames of one sequence

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fmdeploy.data.format import MAX_MEMBER_BYTES, check_splits
from fmdeploy.draft import Draft
from fmdeploy.errors import DataError

SEQUENCES_PER_SHARD = 64
HEADERS = 2**20  # room for the names and shapes of a sequence's arrays
ID_PATTERN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
ZIP_TIME = (1980, 1, 1, 0, 0, 0)


class DatasetWriter:
    """Writes the payload of a DATASET into a draft. Sequences are stored in the order of `add`."""

    def __init__(self, draft: Draft, *, per_shard: int = SEQUENCES_PER_SHARD) -> None:
        self.draft, self.per_shard = draft, per_shard
        self.index: list[dict[str, Any]] = []
        self._tar: tarfile.TarFile | None = None

    def add(self, sequence: str, arrays: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, Any]) -> None:
        """Append one sequence; every array is (T, ...).

        Raises:
            DataError: the id cannot be a file name or repeats, an array is of dtype object, lengths differ, or all
                together is more than what is read of a sequence.
        """
        lengths = {name: array.shape[0] for name, array in arrays.items() if array.ndim}
        if not ID_PATTERN.match(sequence) or any(r["id"] == sequence for r in self.index[-1:]):
            raise DataError("is not a usable, unique sequence id", where=repr(sequence), expected=ID_PATTERN.pattern)
        if len(lengths) != len(arrays) or len(set(lengths.values())) != 1:
            raise DataError("arrays must share a leading time axis", where=sequence, found=lengths)
        if (size := sum(a.nbytes for a in arrays.values())) + HEADERS > MAX_MEMBER_BYTES:
            raise DataError("is too long a sequence to be read again", where=sequence, found=f"{size} bytes",
                            expected=f"at most {MAX_MEMBER_BYTES - HEADERS}", fix="Cut it into several")
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

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of the shard that is open; an unfinished dataset is dropped with its draft."""
        if self._tar is not None:
            self._tar.close()

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


def _add_member(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(payload), 0o644
    tar.addfile(info, io.BytesIO(payload))

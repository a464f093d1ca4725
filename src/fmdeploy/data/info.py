"""`data info`: what a dataset holds, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from fmdeploy.arrays import Arrays
from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, StageConfig
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.sequence import SequenceInfo

RARE = ("rare_near_collision", "rare_cut_in")
PLANES = ("occupancy", "drivable")
AXES = ("scenario", "weather", "date", "map_version", "sensor_rig")


class InfoConfig(StageConfig):
    """Which dataset."""

    data: InputPath = Field(description="A DATASET")


@command(InfoConfig)
def info(config: InfoConfig) -> Outcome:
    """Count what a dataset holds: splits, scenarios, weathers, rare cases, class balance.

    Raises:
        ArtifactError: it is not a DATASET, or was altered.
        DataError: a shard cannot be read.
    """
    data = open_dataset(config.data)
    summary = summarise(data)
    return Outcome(tuple(_lines(summary)), summary)


def summarise(data: Dataset) -> dict[str, Any]:
    """Counts of a dataset, as plain JSON values."""
    place = {sequence: name for name, ids in data.splits.items() for sequence in ids}
    counts = {sequence.id: _counts(data.arrays(sequence)) for sequence in data.sequences}
    splits = {name: _total([s for s in data.sequences if place.get(s.id) == name], counts) for name in data.splits}
    return {
        "digest": data.digest, "path": str(data.artifact.root), **_total(data.sequences, counts), "splits": splits,
        "by": {axis: _by(axis, data.sequences, counts) for axis in AXES if _has(axis, data.sequences)},
    }


def _counts(arrays: Arrays) -> Counter[str]:
    """Frames of each rare case, and cells and occupied cells of each packed plane."""
    found: Counter[str] = Counter()
    for name in RARE:
        if name in arrays:
            found[name] = int(arrays[name].sum())
    for name in PLANES:
        if name in arrays and arrays[name].dtype == np.uint8:
            found[f"{name} on"] = int(np.unpackbits(arrays[name]).sum())
            found[f"{name} all"] = arrays[name].size * 8
    return found


def _total(sequences: Iterable[SequenceInfo], counts: dict[str, Counter[str]]) -> dict[str, Any]:
    chosen = list(sequences)
    added = sum((counts[sequence.id] for sequence in chosen), Counter())
    return {
        "sequences": len(chosen), "simulations": len({s.group for s in chosen}),
        "frames": sum(s.frames for s in chosen),
        "rare_frames": {name.removeprefix("rare_"): added[name] for name in RARE},
        "balance": {n: round(added[f"{n} on"] / added[f"{n} all"], 5) for n in PLANES if added[f"{n} all"]},
    }


def _has(axis: str, sequences: Sequence[SequenceInfo]) -> bool:
    return all(axis in sequence.metadata for sequence in sequences)


def _by(axis: str, sequences: Sequence[SequenceInfo], counts: dict[str, Counter[str]]) -> dict[str, Any]:
    values = sorted({str(sequence.metadata[axis]) for sequence in sequences})
    return {v: _total([s for s in sequences if str(s.metadata[axis]) == v], counts) for v in values}


def _lines(summary: dict[str, Any]) -> Iterable[str]:
    yield f"DATASET {summary['digest'][:12]} at {summary['path']}"
    yield f"  {'':24} sequences simulations frames  near-coll. cut-in  occupied drivable"
    yield _row("all", summary)
    for name, part in summary["splits"].items():
        yield _row(f"split {name}", part)
    for axis, parts in summary["by"].items():
        for value, part in parts.items():
            yield _row(f"{axis} {value}", part)


def _row(name: str, part: dict[str, Any]) -> str:
    rare, balance = part["rare_frames"], part["balance"]
    shares = "".join(f"{balance[plane]:9.2%}" if plane in balance else f"{'-':>9}" for plane in PLANES)
    return (f"  {name:24} {part['sequences']:9d} {part['simulations']:11d} {part['frames']:6d}"
            f" {rare['near_collision']:11d} {rare['cut_in']:6d} {shares}")

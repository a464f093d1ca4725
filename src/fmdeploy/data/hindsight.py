"""Leakage through time: maps from the future, and labels from models that had seen the test drives.

What a sequence's metadata may say:

    date           day of the drive, ISO (2026-03-02)
    map_date       day on which the map version was released that is its context
    label_source   {"model": name, "trained_until": ISO date, "trained_on": [sequences, simulations or recordings]}
                   of automatic labels; people and simulators have none
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fmdeploy.data.leakage import Leak, Splits
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.errors import DataError

TRAINING = "train"


def leaks_of_hindsight(sequences: Sequence[SequenceInfo], splits: Splits) -> list[Leak]:
    """Sequences whose map or labels know what came later.

    Raises:
        DataError: a date is none.
    """
    split_of = {sequence: name for name, ids in splits.items() for sequence in ids}
    placed = [sequence for sequence in sequences if sequence.id in split_of]
    return [*_future_maps(placed, split_of), *_future_labels(placed, split_of)]


def _future_maps(sequences: Sequence[SequenceInfo], split_of: Mapping[str, str]) -> Iterator[Leak]:
    """Drives whose map is younger than they are: it may already show what they are to find out."""
    late: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for sequence in sequences:
        driven, mapped = _day(sequence, "date"), _day(sequence, "map_date")
        if driven is not None and mapped is not None and mapped > driven:
            version = str(sequence.metadata.get("map_version", "unnamed"))
            late[version, mapped.isoformat(), split_of[sequence.id]].append(sequence.id)
    for (version, released, split), ids in late.items():
        yield Leak("future map", tuple(ids), f"map {version} of {released} is younger than the drives", (split,))


def _future_labels(sequences: Sequence[SequenceInfo], split_of: Mapping[str, str]) -> Iterator[Leak]:
    """Labels by a model that was trained on, or after, drives that are held out."""
    held_out = [sequence for sequence in sequences if split_of[sequence.id] != TRAINING]
    names = {name: sequence for sequence in held_out for name in _names(sequence)}
    first = min((day for sequence in held_out if (day := _day(sequence, "date")) is not None), default=None)
    told: dict[tuple[str, str], list[str]] = defaultdict(list)
    for sequence in sequences:
        source = sequence.metadata.get("label_source")
        if isinstance(source, Mapping) and (why := _why(sequence, source, split_of[sequence.id], names, first)):
            told[why, split_of[sequence.id]].append(sequence.id)
    for (why, split), ids in told.items():
        yield Leak("labels from the future", tuple(ids), why, (split,))


def _why(
    sequence: SequenceInfo, source: Mapping[str, Any], split: str, held_out: Mapping[str, SequenceInfo],
    first: datetime.date | None,
) -> str:
    """What is wrong with the source of a sequence's labels; empty where nothing is."""
    model = str(source.get("model", "unnamed"))
    seen = sorted(held_out[name].id for name in map(str, source.get("trained_on", ())) if name in held_out)
    if seen:
        return f"the model {model} that labelled them was trained on {seen[0]}, which is held out"
    until = _date(source.get("trained_until"), sequence, "label_source.trained_until")
    if until is None:
        return ""
    driven = _day(sequence, "date")
    if split != TRAINING and driven is not None and until >= driven:
        return f"the model {model} that labelled them was trained until {until}, not before the drives"
    if split == TRAINING and first is not None and until >= first:
        return f"the model {model} that labelled them was trained until {until}; held-out drives begin on {first}"
    return ""


def _names(sequence: SequenceInfo) -> set[str]:
    return {sequence.id, *(str(sequence.metadata[k]) for k in ("simulation", "recording") if k in sequence.metadata)}


def _day(sequence: SequenceInfo, key: str) -> datetime.date | None:
    return _date(sequence.metadata.get(key), sequence, key)


def _date(value: object, sequence: SequenceInfo, key: str) -> datetime.date | None:
    if value is None:
        return None
    try:
        return datetime.date.fromisoformat(str(value)[:10])
    except ValueError as error:
        raise DataError(f"sequence {sequence.id}: {key} is no date", where="metadata", found=repr(value)[:40],
                        expected="YYYY-MM-DD") from error

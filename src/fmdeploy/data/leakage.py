"""What must not be in two splits at once: sequences, seeds, simulations and neighbouring frames."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.errors import LeakageError

MIN_GAP = 12
"""Frames between two parts of one recording: a sample looks back 3 frames and ahead 8."""


@dataclass(frozen=True)
class Leak:
    """One pair of things that should be apart."""

    kind: str
    one: str
    other: str
    splits: tuple[str, str]
    detail: str

    def line(self) -> str:
        """The leak for a person."""
        return f"{self.kind}: {self.one} ({self.splits[0]}) and {self.other} ({self.splits[1]}): {self.detail}"

    def to_json(self) -> dict[str, Any]:
        """The leak for a machine."""
        return {**asdict(self), "splits": list(self.splits)}


Splits = Mapping[str, Sequence[str]]


def leaks_of_keys(sequences: Sequence[SequenceInfo], splits: Splits) -> list[Leak]:
    """Sequences that stand in two splits, or share a seed or a simulation across splits."""
    found = [
        Leak("shared sequence", sequence, sequence, (a, b), "the same sequence is in both")
        for a, b in combinations(splits, 2) for sequence in sorted(set(splits[a]) & set(splits[b]))
    ]
    for key, read in _KEYS.items():
        seen = {(leak.one, leak.other) for leak in found}
        for one, other, names in _across(sequences, splits, read):
            if one.id != other.id and (one.id, other.id) not in seen:
                found.append(Leak(f"shared {key}", one.id, other.id, names, f"{key} {read(one)}"))
    return found


_KEYS: dict[str, Callable[[SequenceInfo], Any]] = {
    "seed": lambda s: s.metadata.get("seed"),
    "simulation": lambda s: s.metadata.get("simulation"),
}


def leaks_of_neighbours(sequences: Sequence[SequenceInfo], splits: Splits) -> list[Leak]:
    """Parts of one recording, fewer than `MIN_GAP` frames apart, in two splits.

    A part says what it is cut from by `recording` and `first_frame` in its metadata.
    """
    found = []
    for one, other, names in _across(sequences, splits, lambda s: s.metadata.get("recording")):
        (a, a_end), (b, b_end) = _span(one), _span(other)
        gap = max(a, b) - min(a_end, b_end)
        if one.id != other.id and gap < MIN_GAP:
            found.append(Leak("adjacent frames", one.id, other.id, names,
                              f"frames {a}..{a_end - 1} and {b}..{b_end - 1} of {one.metadata['recording']}"))
    return found


def _span(sequence: SequenceInfo) -> tuple[int, int]:
    first = int(sequence.metadata.get("first_frame", 0))
    return first, first + sequence.frames


def _across(
    sequences: Sequence[SequenceInfo], splits: Splits, key: Callable[[SequenceInfo], Any]
) -> Iterable[tuple[SequenceInfo, SequenceInfo, tuple[str, str]]]:
    """Pairs of sequences with one value of `key` (None counts as none) in two different splits."""
    split_of = {sequence: name for name, ids in splits.items() for sequence in ids}
    together: dict[Any, list[SequenceInfo]] = defaultdict(list)
    for sequence in sequences:
        if sequence.id in split_of and (value := key(sequence)) is not None:
            together[value].append(sequence)
    for members in together.values():
        for one, other in combinations(members, 2):
            if split_of[one.id] != split_of[other.id]:
                yield one, other, (split_of[one.id], split_of[other.id])


def refuse_leaks(sequences: Sequence[SequenceInfo], splits: Splits, where: object) -> None:
    """Refuse splits that leak by sequence, seed, simulation or neighbouring frames.

    Raises:
        LeakageError: names the first pair and how many there are.
    """
    found = [*leaks_of_keys(sequences, splits), *leaks_of_neighbours(sequences, splits)]
    if found:
        raise LeakageError(f"this split leaks: {found[0].line()}", where=where,
                           expected="no sequence, seed or recording in two splits",
                           found=f"{len(found)} pair{'s' if len(found) > 1 else ''}")

"""What must not be in two splits at once: sequences, seeds, simulations, neighbouring frames, one drive of a day."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.errors import DataError, LeakageError

MIN_GAP = 12
"""Frames between two parts of one recording: a sample looks back 3 frames and ahead 8."""


@dataclass(frozen=True)
class Leak:
    """One way in which something is known in a split that must not be.

    Attributes:
        trap: Its kind, such as `shared seed`.
        samples: Names of what it is about: two sequences that should be apart, or all that are concerned.
        why: What was found, in a few words.
        splits: Where: two splits, or one.
    """

    trap: str
    samples: tuple[str, ...]
    why: str
    splits: tuple[str, ...]

    def line(self) -> str:
        """The leak for a person."""
        if len(self.samples) == len(self.splits) == 2:
            (one, other), (here, there) = self.samples, self.splits
            return f"{self.trap}: {one} ({here}) and {other} ({there}): {self.why}"
        shown = ", ".join(self.samples[:3]) + (f" and {len(self.samples) - 3} more" if len(self.samples) > 3 else "")
        return f"{self.trap}: {shown} ({', '.join(self.splits)}): {self.why}"

    def to_json(self) -> dict[str, Any]:
        """The leak for a machine: trap, samples and why."""
        where = " and ".join(self.splits)
        return {"trap": self.trap, "samples": list(self.samples), "why": f"{self.why} ({where})"}


Splits = Mapping[str, Sequence[str]]


def leaks_of_keys(sequences: Sequence[SequenceInfo], splits: Splits) -> list[Leak]:
    """Sequences that stand in two splits, or share a seed or a simulation across splits."""
    found = [
        Leak("shared sequence", (sequence, sequence), "the same sequence is in both", (a, b))
        for a, b in combinations(splits, 2) for sequence in sorted(set(splits[a]) & set(splits[b]))
    ]
    for key, read in _KEYS.items():
        seen = {leak.samples for leak in found}
        for one, other, names in _across(sequences, splits, read):
            if one.id != other.id and (one.id, other.id) not in seen:
                found.append(Leak(f"shared {key}", (one.id, other.id), f"{key} {read(one)}", names))
    return found


_KEYS: dict[str, Callable[[SequenceInfo], Any]] = {
    "seed": lambda s: s.metadata.get("seed"),
    "simulation": lambda s: s.metadata.get("simulation"),
}


def leaks_of_neighbours(sequences: Sequence[SequenceInfo], splits: Splits) -> list[Leak]:
    """Parts of one recording, fewer than `MIN_GAP` frames apart, in two splits.

    A part says what it is cut from by `recording` and `first_frame` in its metadata.

    Raises:
        DataError: a `first_frame` is no number.
    """
    found = []
    for one, other, names in _across(sequences, splits, lambda s: s.metadata.get("recording")):
        (a, a_end), (b, b_end) = _span(one), _span(other)
        gap = max(a, b) - min(a_end, b_end)
        if one.id != other.id and gap < MIN_GAP:
            why = f"frames {a}..{a_end - 1} and {b}..{b_end - 1} of {one.metadata['recording']}"
            found.append(Leak("adjacent frames", (one.id, other.id), why, names))
    return found


def leaks_of_routes(sequences: Sequence[SequenceInfo], splits: Splits) -> list[Leak]:
    """One route driven on one day, in two splits: the same parked cars, road works and light."""
    found = []
    for one, other, names in _across(sequences, splits, _route_and_day):
        if one.id != other.id:
            why = f"route {one.metadata['route']} on {one.metadata['date']}"
            found.append(Leak("same route same day", (one.id, other.id), why, names))
    return found


def _route_and_day(sequence: SequenceInfo) -> tuple[str, str] | None:
    route, date = sequence.metadata.get("route"), sequence.metadata.get("date")
    return None if route is None or date is None else (str(route), str(date)[:10])


def _span(sequence: SequenceInfo) -> tuple[int, int]:
    said = sequence.metadata.get("first_frame", 0)
    try:
        first = int(said)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"sequence {sequence.id}: first_frame is no whole number", where="metadata",
                        found=repr(said)[:40]) from error
    return first, first + sequence.frames


def _across(
    sequences: Sequence[SequenceInfo], splits: Splits, key: Callable[[SequenceInfo], Any]
) -> Iterable[tuple[SequenceInfo, SequenceInfo, tuple[str, str]]]:
    """Pairs of sequences with one value of `key` (None counts as none) in two different splits.

    Metadata may hold any JSON, so values that cannot be hashed are compared as they are written.
    """
    split_of = {sequence: name for name, ids in splits.items() for sequence in ids}
    together: dict[Any, list[SequenceInfo]] = defaultdict(list)
    for sequence in sequences:
        if sequence.id in split_of and (value := key(sequence)) is not None:
            together[value if isinstance(value, Hashable) else repr(value)].append(sequence)
    for members in together.values():
        for one, other in combinations(members, 2):
            if split_of[one.id] != split_of[other.id]:
                yield one, other, (split_of[one.id], split_of[other.id])


def leaks_of_splits(sequences: Sequence[SequenceInfo], splits: Splits) -> list[Leak]:
    """All that the metadata alone says about how sequences were divided; a pair is named once."""
    found = [*leaks_of_keys(sequences, splits), *leaks_of_neighbours(sequences, splits)]
    seen = {frozenset(leak.samples) for leak in found}
    return [*found, *(leak for leak in leaks_of_routes(sequences, splits) if frozenset(leak.samples) not in seen)]


def refuse_leaks(sequences: Sequence[SequenceInfo], splits: Splits, where: object) -> None:
    """Refuse splits that leak by sequence, seed, simulation, neighbouring frames, or route and day.

    Raises:
        LeakageError: names the first pair and how many there are.
    """
    found = leaks_of_splits(sequences, splits)
    if found:
        raise LeakageError(f"this split leaks: {found[0].line()}", where=where,
                           expected="no sequence, seed, recording or drive of a day in two splits",
                           found=f"{len(found)} pair{'s' if len(found) > 1 else ''}")


def simulation_of(sequence: SequenceInfo) -> str | None:
    """What it was recorded from, by a name that tells it apart in any dataset.

    None where it has none but its own: unrelated sets of arrays number their groups alike, and logs share file names.
    """
    name = sequence.metadata.get("simulation")
    return None if name is None or sequence.id.endswith(str(name)) else str(name)

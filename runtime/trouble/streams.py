"""Samples as streams: the frames of each sequence in the order of time.

Legend: N samples, T frames of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fmdeploy.arrays import Arrays
from fmdeploy.runtime.trouble.faults import ONSET
from fmdeploy.task import Array, Samples


@dataclass(frozen=True)
class Stream:
    """One sequence.

    Attributes:
        rows: Numbers of its samples, in the order of time (T).
        times: Their frame numbers within the recording (T); without meaning where samples are no stream.
    """

    rows: Array
    times: Array

    @property
    def judged(self) -> Array:
        """Numbers of the samples behind the onset of the faults."""
        return self.rows[ONSET:]


@dataclass(frozen=True)
class Frames:
    """The content of one sequence, clean."""

    inputs: Arrays
    targets: Arrays

    def clean(self, position: int) -> Arrays:
        """The inputs at one position, as copies that their receiver may keep."""
        return {name: array[position].copy() for name, array in self.inputs.items()}


def streams_of(samples: Samples, most: int | None = None) -> list[Stream]:
    """The sequences that are long enough to judge, at most so many, spread evenly over all of them."""
    members: dict[str, list[tuple[int, int]]] = {}
    for row, name in enumerate(samples.ids):
        sequence, _, frame = name.rpartition("/")
        members.setdefault(sequence, []).append((int(frame) if frame.isdigit() else row, row))
    found = [_stream(pairs) for pairs in members.values() if len(pairs) > ONSET]
    if most is None or most >= len(found):
        return found
    return [found[k] for k in np.linspace(0, len(found) - 1, most).round().astype(int)]


def _stream(pairs: Sequence[tuple[int, int]]) -> Stream:
    times, rows = zip(*sorted(pairs), strict=True)
    return Stream(np.asarray(rows), np.asarray(times))


def frames_of(samples: Samples, streams: Sequence[Stream]) -> Iterator[tuple[Stream, Frames]]:
    """Read one sequence after the other."""
    for stream in streams:
        yield stream, Frames(*samples.batch(stream.rows))

"""Slots of shared memory that one process fills and another reads; a torn slot is never read as a frame.

A slot is written in this order: `begun`, tensors, notes, `done`. It holds frame n only while both numbers are n + 1, so
a writer that was killed in between leaves a slot that nobody accepts, and a reader that was overtaken sees it after its
copy. Numbers never repeat in the life of a ring, and every worker gets a fresh one. The notes also carry a checksum.

The numbers are single aligned 64-bit stores. That the other core sees them in order is the doorbell's work: a reader
looks at a slot only after it was told about it through a socket, and the system call orders memory on ARM, too.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.iospec import TensorSpec

ALIGN = 64  # one cache line: no two tensors share one, and vector loads are aligned
NOTES_BYTES = 16384
# Positions in the header, in 64-bit words.
BEGUN, DONE, STAMP, PRESENT, NOTES = range(5)
HEADER = struct.Struct("@5Q")  # all words of the header in one call


class Slot(NamedTuple):
    """What was in a slot.

    Attributes:
        seq: Number of the frame.
        stamp_ns: The time that its writer gave it.
        arrays: Tensors that are present, by name.
        notes: Bytes beside the tensors.
    """

    seq: int
    stamp_ns: int
    arrays: Arrays
    notes: bytes


class Ring:
    """A row of slots for frames of fixed shape in a buffer that two processes share."""

    def __init__(self, buffer: Any, tensors: Sequence[TensorSpec], slots: int) -> None:
        """Lay slots over the first `size_of(tensors, slots)` bytes of a zeroed buffer.

        Args:
            buffer: Writable buffer, aligned to cache lines.
            tensors: What a frame may hold.
            slots: Frames that fit at the same time.
        """
        self.slots, self._names = slots, [spec.name for spec in tensors]
        places, size = _places(tensors)
        view = memoryview(buffer)
        self._all = (1 << len(self._names)) - 1
        self._words = [view[n * size : n * size + ALIGN].cast("Q") for n in range(slots)]
        self._notes = [view[n * size + ALIGN : n * size + ALIGN + NOTES_BYTES] for n in range(slots)]
        self._views = [
            {spec.name: np.frombuffer(view, np.dtype(spec.dtype), math.prod(spec.shape), n * size + place)
             .reshape(spec.shape) for spec, place in zip(tensors, places, strict=True)}
            for n in range(slots)
        ]

    @staticmethod
    def size_of(tensors: Sequence[TensorSpec], slots: int) -> int:
        """Bytes that a ring takes."""
        return _places(tensors)[1] * slots

    def arrays(self) -> list[Array]:
        """All tensors of all slots, as `peek` gives them."""
        return [array for views in self._views for array in views.values()]

    def begin(self, seq: int) -> Arrays:
        """Take the slot of frame `seq` and return its tensors to be filled; nobody accepts it until `commit`."""
        at = seq % self.slots
        self._words[at][BEGUN] = seq + 1
        return self._views[at]

    def commit(self, seq: int, stamp_ns: int, present: Sequence[str], notes: bytes) -> None:
        """Finish the slot that `begin` took.

        Raises:
            ValueError: The notes do not fit.
        """
        if len(notes) > NOTES_BYTES:
            raise ValueError(f"notes of {len(notes)} bytes, at most {NOTES_BYTES} fit")
        at = seq % self.slots
        words, mask = self._words[at], self._all
        if len(present) < len(self._names):
            mask = sum(1 << self._names.index(name) for name in present)
        self._notes[at][: len(notes)] = notes
        words[STAMP], words[PRESENT] = stamp_ns, mask
        words[NOTES] = len(notes) << 32 | _checksum(seq, stamp_ns, mask, notes)
        words[DONE] = seq + 1

    def write(self, seq: int, stamp_ns: int, arrays: Mapping[str, Array], notes: bytes = b"") -> None:
        """Fill the slot of frame `seq` at once."""
        views = self.begin(seq)
        for name, array in arrays.items():
            np.copyto(views[name], array, casting="no")
        self.commit(seq, stamp_ns, list(arrays), notes)

    def peek(self, seq: int) -> Slot | None:
        """Return frame `seq` without copying its tensors; None when the slot does not hold all of it.

        The tensors are the slot itself: they change when the writer takes it again. Ask `holds` after the last use.
        """
        at = seq % self.slots
        begun, done, stamp, mask, noted = HEADER.unpack_from(self._words[at])
        if not begun == done == seq + 1:
            return None
        length = noted >> 32
        notes = bytes(self._notes[at][:length]) if 0 < length <= NOTES_BYTES else b""
        if noted & 0xFFFFFFFF != _checksum(seq, stamp, mask, notes):
            return None
        arrays = self._views[at]
        if mask != self._all:
            arrays = {name: arrays[name] for bit, name in enumerate(self._names) if mask >> bit & 1}
        return Slot(seq, stamp, arrays, notes)

    def read(self, seq: int) -> Slot | None:
        """Return a copy of frame `seq`; None when the slot does not hold all of it."""
        slot = self.peek(seq)
        if slot is None:
            return None
        arrays: Arrays = {}
        for name, array in slot.arrays.items():
            arrays[name] = array.copy()
        return Slot(seq, slot.stamp_ns, arrays, slot.notes) if self.holds(seq) else None

    def holds(self, seq: int) -> bool:
        """Whether the slot of frame `seq` holds that frame, finished."""
        words = self._words[seq % self.slots]
        return words[BEGUN] == words[DONE] == seq + 1


def _places(tensors: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """Offset of every tensor in a slot, and the slot's size."""
    places, size = [], ALIGN + NOTES_BYTES
    for spec in tensors:
        places.append(size)
        size += -(-math.prod(spec.shape) * np.dtype(spec.dtype).itemsize // ALIGN) * ALIGN
    return places, size


def _checksum(seq: int, stamp_ns: int, mask: int, notes: bytes) -> int:
    """CRC-32 of the notes; it starts from the numbers of the header, so that no byte of one can change unseen."""
    folded = seq ^ stamp_ns ^ mask
    return zlib.crc32(notes, (folded ^ folded >> 32) & 0xFFFFFFFF)

"""What parent and worker share: one anonymous piece of memory, a socket as doorbell, a pipe as lifeline.

    memory     heartbeat | ring of frames, written by the parent | ring of results, written by the worker
    socket     packets: who rang, and for which frame; its end is the death of the other side, known at once
    lifeline   nothing is ever written; when the parent dies the kernel ends the worker, even inside a C call

The memory has no name (`memfd_create`), so nothing is left behind however either side dies, and no tracker of shared
memory can unlink it twice. Every worker gets a channel of its own: what a dead one half wrote dies with it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import time
from typing import NamedTuple

from fmdeploy.iospec import IOSpec
from fmdeploy.runtime.supervisor.ring import Ring

SLOTS = 1  # one frame is in flight, and one slot stays in the caches
PAGE = 4096
# Positions in the heartbeat's page, in 64-bit words.
BEAT_NS, COMPLETED, BUSY = 0, 1, 2


class Handles(NamedTuple):
    """Descriptors that a worker inherits."""

    memory: int
    socket: int
    lifeline: int


class Heartbeat(NamedTuple):
    """What a worker last said of itself.

    Attributes:
        at_ns: When its loop last came round, on the monotonic clock; 0: never.
        completed: Frames and self-tests that it has completed.
        busy: Number of the frame it runs; None between frames.
    """

    at_ns: int
    completed: int
    busy: int | None


class Channel:
    """One side's view of what is shared."""

    def __init__(self, io: IOSpec, memory: int, doorbell: socket.socket) -> None:
        """Map the memory behind a descriptor, which stays the caller's."""
        self.doorbell = doorbell
        self._map = mmap.mmap(memory, size_of(io))
        view = memoryview(self._map)
        self._beat = view[:PAGE].cast("Q")
        middle = PAGE + Ring.size_of(io.inputs, SLOTS)
        self.frames = Ring(view[PAGE:middle], io.inputs, SLOTS)
        self.results = Ring(view[middle:], io.outputs, SLOTS)

    def beat(self, *, busy: int | None = None, completed: int | None = None) -> None:
        """Say that the worker's loop came round: only ever called by that loop itself."""
        self._beat[BUSY] = 0 if busy is None else busy + 1
        if completed is not None:
            self._beat[COMPLETED] = completed
        self._beat[BEAT_NS] = time.monotonic_ns()

    def heartbeat(self) -> Heartbeat:
        """Read the worker's heartbeat."""
        busy = self._beat[BUSY]
        return Heartbeat(self._beat[BEAT_NS], self._beat[COMPLETED], busy - 1 if busy else None)

    def close(self) -> None:
        """Hang up. The memory goes when the last array that looks at it goes."""
        self.doorbell.close()


def size_of(io: IOSpec) -> int:
    """Bytes of shared memory for one channel."""
    return PAGE + Ring.size_of(io.inputs, SLOTS) + Ring.size_of(io.outputs, SLOTS)


def make_memory(io: IOSpec) -> int:
    """Return a descriptor of zeroed memory of the right size, which cannot shrink under anybody's feet."""
    memory = os.memfd_create("fmdeploy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, size_of(io))
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return memory


def tie_to_parent(lifeline: int) -> None:
    """End this process when the other end of the lifeline closes.

    The kernel sends SIGIO, whose default action ends the process: no Python code has to run, so it works inside a call
    that holds the interpreter. (PR_SET_PDEATHSIG would fire when the *thread* that started the worker ends.)
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    os.set_blocking(lifeline, False)
    try:
        gone = os.read(lifeline, 1) == b""  # closed before the kernel knew whom to tell
    except BlockingIOError:
        gone = False
    if gone:
        raise SystemExit(0)

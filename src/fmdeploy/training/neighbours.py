"""Sums over processes of one machine through shared memory.

gloo sends through TCP sockets and threads of its own even between two processes of one machine: on two idle cores a sum
of 128 numbers took 0.5 ms and every tenth 4, against 0.08 here (benchmarks/sums.py). With a BatchNorm in every layer
that is most of what a second process should gain. So every process writes into its own part of a mapped file, tells the
others through sockets, and adds up all parts in the order of ranks: all get the same bits.

Legend: R processes.
"""

from __future__ import annotations

import mmap
import socket
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fmdeploy.errors import FmdeployError, MissingError

CHUNK = 1 << 20  # bytes of a part: what several processes add up stays in the cache
ALIGNED = 64  # bytes, at a multiple of which every tensor begins
MEMORY = Path("/dev/shm")  # a file there is never written to a disk
HEADER = struct.Struct("<qq")  # number of the sum, bytes
PATIENCE = 1800  # seconds, as torch.distributed waits
GLANCE = 2e-4  # seconds in which others are looked for: to be put to sleep and woken takes longer than most waits


class Neighbours:
    """All processes of a group, where they share a machine. Made by `meet`.

    There are two sets of parts, used in turn: who has heard that all have written the next one knows that all have read
    the last one, so that one message a sum is enough.

    Args:
        rank: Of this process.
        parts: Bytes (2, R, CHUNK) that all of them see.
        others: A connection to each other process.
    """

    def __init__(self, rank: int, parts: Tensor, others: list[socket.socket]) -> None:
        self.rank, self.parts, self.others, self.count = rank, parts, others, 0

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, on the CPU and contiguous, by its sum over all processes, which call this alike.

        Raises:
            MissingError: another process is gone.
            FmdeployError: another process is at another sum.
        """
        for pieces in _packed(tensors):
            parts = self.parts[self.count % 2]
            places = [[part[at : at + piece.nbytes].view(piece.dtype) for at, piece in pieces] for part in parts]
            for (_, piece), place in zip(pieces, places[self.rank], strict=True):
                place.copy_(piece)
            self._tell(pieces[-1][0] + pieces[-1][1].nbytes)
            for (_, piece), first, second, *others in zip(pieces, *places, strict=True):
                torch.add(first, second, out=piece)
                for other in others:
                    piece.add_(other)

    def _tell(self, size: int) -> None:
        """Say that this process has written, and wait until all have. The system calls order the memory, too."""
        self.count += 1
        mine = HEADER.pack(self.count, size)
        try:
            for other in self.others:
                other.send(mine)
            found = [_heard(other) for other in self.others]
        except BlockingIOError as error:
            raise MissingError(f"another process of this run has not answered for {PATIENCE} s") from error
        except ConnectionError:
            found = [b""]
        for theirs in found:
            if not theirs:
                raise MissingError("another process of this run has ended", fix="Its own message says why")
            if theirs != mine:
                raise FmdeployError("processes of one run are not at the same sum", expected=HEADER.unpack(mine),
                                    found=HEADER.unpack(theirs))

    def close(self) -> None:
        """Let the others know that this process has gone."""
        for other in self.others:
            other.close()


def _packed(tensors: Sequence[Tensor]) -> Iterator[list[tuple[int, Tensor]]]:
    """Flat pieces that fit into a part together, each with the byte at which it begins there."""
    found: list[tuple[int, Tensor]] = []
    at = 0
    for tensor in tensors:
        for piece in torch.split(tensor.detach().view(-1), CHUNK // tensor.element_size()):
            if at + piece.nbytes > CHUNK:
                yield found
                found, at = [], 0
            found.append((at, piece))
            at += -(-piece.nbytes // ALIGNED) * ALIGNED
    if found:
        yield found


def _heard(other: socket.socket) -> bytes:
    """What another process says; nothing when it has ended."""
    end = time.perf_counter() + GLANCE
    while time.perf_counter() < end:
        with suppress(BlockingIOError):
            return other.recv(HEADER.size, socket.MSG_DONTWAIT)
    return other.recv(HEADER.size)


def meet() -> Neighbours | None:
    """The processes of the default group, if they can share memory; None: they cannot. Called by all of them."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with _prepared(rank, size) as named:
        told = [named]
        dist.broadcast_object_list(told)
        folder = told[0]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            parts = _opened(folder, rank, size, listener) if folder else None
            if not _all_agree(parts is not None) or parts is None or folder is None:
                return None
            near = Neighbours(rank, parts, _connected(folder, rank, size, listener))
        if _all_agree(len(near.others) == size - 1):
            return near
        near.close()
        return None


@contextmanager
def _prepared(rank: int, size: int) -> Iterator[str | None]:
    """In rank 0 the name of a folder with the file of parts, None where there is no room for it; None in the others.

    The file and the sockets have names only until all have opened them, so that nothing is left behind.
    """
    if rank != 0:
        yield None
        return
    with ExitStack() as stack:
        folder = None
        with suppress(OSError):
            made = stack.enter_context(tempfile.TemporaryDirectory(prefix="fmdeploy-", dir=MEMORY))
            # Written, not only cut to length: that the memory is full must be seen now, not by a SIGBUS later.
            Path(made, "parts").write_bytes(bytes(2 * size * CHUNK))
            folder = made
        yield folder


def _opened(folder: str, rank: int, size: int, listener: socket.socket) -> Tensor | None:
    """The mapped parts (2, R, CHUNK), once others can call; None where the folder is not on this machine."""
    with suppress(OSError), Path(folder, "parts").open("r+b") as file:
        listener.bind(str(Path(folder, str(rank))))
        listener.listen(size)
        return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8).view(2, size, CHUNK)
    return None


def _connected(folder: str, rank: int, size: int, listener: socket.socket) -> list[socket.socket]:
    """One connection to each other process: each calls those before it, and is called by those after it."""
    found = []
    with suppress(OSError):
        for number in range(rank):
            call = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            call.connect(str(Path(folder, str(number))))
            found.append(call)
        listener.settimeout(PATIENCE)  # one that could not call must not keep the others here
        for _ in range(rank + 1, size):
            found.append(listener.accept()[0])
    for other in found:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", PATIENCE, 0))
    return found


def _all_agree(mine: bool) -> bool:
    vote = torch.tensor(int(mine))
    dist.all_reduce(vote, dist.ReduceOp.MIN)
    return bool(vote)

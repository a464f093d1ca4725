"""A CUDA graph: work that was enqueued once, written down, and is then launched in one call.

It holds for the addresses and shapes it was written down with; both are fixed for the life of a backend here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from fmdeploy.runtime.backends.cuda import Cuda, CudaError


def capture(cuda: Cuda, stream: int, enqueue: Callable[[], None]) -> int:
    """Write down what `enqueue` gives to `stream`, without doing it.

    Args:
        cuda: The CUDA runtime.
        stream: A stream that is not the default one, with nothing pending.
        enqueue: Gives the work to the stream; it must neither wait nor allocate, and must have run once before.

    Returns:
        What `Cuda.launch` takes and `Cuda.destroy_executable` gives back.

    Raises:
        CudaError: the work cannot be written down; the stream is as before.
    """
    cuda.begin_capture(stream)
    try:
        enqueue()
    except BaseException:
        with suppress(CudaError):  # a capture that failed is still open, and would swallow all later work
            if graph := cuda.end_capture(stream):
                cuda.destroy_graph(graph)
        raise
    graph = cuda.end_capture(stream)
    try:
        return cuda.instantiate(graph)
    finally:
        cuda.destroy_graph(graph)

"""Ctrl-C that no library can swallow.

A KeyboardInterrupt that arrives while some packages are being imported disappears in an `except` of theirs, and the
stage would go on as if nothing had been said. So it is also remembered, and raised again at the next step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


@contextmanager
def remembered() -> Iterator[None]:
    """Remember Ctrl-C inside the block; the former handler comes back afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked.clear()
    former = signal.signal(signal.SIGINT, _handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def check() -> None:
    """Stop here if Ctrl-C was pressed before and got lost.

    Raises:
        KeyboardInterrupt: it was.
    """
    if _asked.is_set():
        raise KeyboardInterrupt


def _handle(number: int, frame: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt

"""Ctrl-C that no library can swallow.

A KeyboardInterrupt that arrives while some packages are being imported disappears in an `except` of theirs, and the
stage would go on as if nothing had been said. So it is also remembered, and raised again at the next step.
"""

from __future__ import annotations

import signal
import sys
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
    former, hook = signal.signal(signal.SIGINT, _handle), sys.unraisablehook
    sys.unraisablehook = _quiet
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, former)


@contextmanager
def hidden_from_children() -> Iterator[None]:
    """Processes that are started inside the block never see Ctrl-C: whoever started them ends them, in silence."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a child keeps its mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def check() -> None:
    """Stop here if Ctrl-C was pressed before and got lost.

    Raises:
        KeyboardInterrupt: it was.
    """
    if _asked.is_set():
        raise KeyboardInterrupt


def _quiet(lost: sys.UnraisableHookArgs) -> None:
    """Say nothing of a Ctrl-C that arrived inside a callback of the import system: it is remembered."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)


def _handle(number: int, frame: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt

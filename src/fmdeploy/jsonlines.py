"""Records that a stage prints as they come, where the command line asked for `--json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_SINK: ContextVar[Callable[[str], None] | None] = ContextVar("records", default=None)


@contextmanager
def records_to(sink: Callable[[str], None] | None) -> Iterator[None]:
    """Send what `emit` is given to `sink`, one line of JSON each; None: nobody listens."""
    token = _SINK.set(sink)
    try:
        yield
    finally:
        _SINK.reset(token)


def somebody_listens() -> bool:
    """Whether records are printed; then a stage leaves its `Outcome.data` empty (None), since all is said."""
    return _SINK.get() is not None


def emit(record: Mapping[str, Any]) -> None:
    """Print one record at once, where somebody listens."""
    sink = _SINK.get()
    if sink is not None:
        sink(json.dumps(record, sort_keys=True))

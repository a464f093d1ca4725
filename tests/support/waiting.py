"""Waiting for what other threads and processes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 60.0


def wait_for(condition: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    """Return what `condition` returns as soon as it is true; fail where it never is."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.005)
    return found

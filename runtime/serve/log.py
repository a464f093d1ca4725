"""One JSON line an event on stderr. A log that nobody reads, or a full disk, stops nothing: lost lines are counted."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

lost = 0
"""Lines that could not be written."""


def note(event: str, **facts: Any) -> None:
    """Write one line: what happened, when, and in which process."""
    global lost
    line = {"time": round(time.time(), 3), "event": event, "pid": os.getpid(), **facts}
    try:
        print(json.dumps(line, default=str), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        lost += 1

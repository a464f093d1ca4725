"""A file with one JSON line an event, for whoever asks later what happened. A full disk costs lines, never frames."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class EventLog:
    """Appends lines.

    Attributes:
        num_lost: Lines that could not be written.
    """

    def __init__(self, path: Path | None) -> None:
        """Append to `path`; None: nowhere."""
        self.path, self.num_lost = path, 0

    def write(self, event: str, **facts: Any) -> None:
        """Append one line, all of it or, where the disk is full or read-only, nothing that counts."""
        if self.path is None:
            return
        line = json.dumps({"event": event, "unix_s": round(time.time(), 3), **facts}, sort_keys=True) + "\n"
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
            handle = os.open(self.path, flags, 0o644)
            try:
                written = os.write(handle, line.encode())
            finally:
                os.close(handle)
            self.num_lost += written != len(line)
        except OSError:
            self.num_lost += 1

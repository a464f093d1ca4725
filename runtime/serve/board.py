"""What the board says about heat and current, told to the runtime that serves: a throttled board is mode D1.

Only a Jetson is watched: elsewhere nothing is known that would be worth a process. A thread of its own looks, since a
telemetry process that has to be started anew would hold up the event loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fmdeploy.jetson.machine import is_jetson
from fmdeploy.jetson.watch import Watch
from fmdeploy.runtime.health import PerceptionRuntime
from fmdeploy.runtime.serve.log import note
from fmdeploy.runtime.state import EventKind

LOOK_S = 0.2


class BoardWatch:
    """Tells whichever runtime serves whether the board throttles.

    Attributes:
        watched: Whether there is a board to watch.
    """

    def __init__(self, serving: Callable[[], PerceptionRuntime | None], root: Path = Path("/")) -> None:
        """Watch the machine below `root` once `begin` was called; `serving` gives the runtime of the moment."""
        self.watched = is_jetson(root)
        self._serving, self._root, self._ended = serving, root, threading.Event()
        self._thread = threading.Thread(target=self._run, name="fmdeploy-board", daemon=True)

    def begin(self) -> None:
        """Start watching, where there is something to watch."""
        if self.watched:
            self._thread.start()

    def close(self) -> None:
        """End the telemetry process."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(5.0)

    def _run(self) -> None:
        told: PerceptionRuntime | None = None
        throttled = ""  # why, as long as it lasts
        with Watch(self._root) as watch:
            while not self._ended.wait(LOOK_S):
                events, runtime = watch.events(), self._serving()
                for kind, detail in events:
                    note(kind, detail=detail)
                    throttled = detail if EventKind(kind) is EventKind.THROTTLED else ""
                    if runtime is not None:
                        _tell(runtime, EventKind(kind), detail)
                if runtime is not None and runtime is not told and throttled and not events:
                    _tell(runtime, EventKind.THROTTLED, throttled)  # a model that was loaded meanwhile
                told = runtime


def _tell(runtime: PerceptionRuntime, kind: EventKind, detail: str) -> None:
    with suppress(Exception):  # a runtime that is being closed; the watch goes on for its successor
        runtime.note(kind, detail)

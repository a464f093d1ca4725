"""Telemetry in a process of its own, so that neither a slow sensor nor a hanging tool can hold up an inference.

    with Telemetry() as telemetry:
        telemetry.begin()                  # a new window
        ...                                # what is measured
        window = telemetry.end()           # its summary; None: UNKNOWN

`latest()` never waits. What is not fresh is not returned: UNKNOWN is None, never an old or a zero value.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from fmdeploy.jetson.window import Window

RATE_HZ = 20.0  # twice the 10 Hz that a memory peak needs, so that a busy machine still keeps them
FRESH_S = 0.5
START_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 5.0
MAX_MESSAGE = 1 << 18


class Telemetry:
    """The reading end; it owns the process."""

    def __init__(self, root: Path = Path("/"), *, rate_hz: float = RATE_HZ, pid: int | None = None) -> None:
        """Start the process.

        Args:
            root: Folder below which /proc, /sys and `tegrastats` are; another than / for tests.
            rate_hz: Snapshots a second.
            pid: A process whose memory is of interest.
        """
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._tokens, self._mark = itertools.count(1), 0
        self._message: dict[str, Any] | None = None
        self._received_at = -1e9
        code = "import sys; from fmdeploy.jetson.sampler import main; main(*sys.argv[1:5])"
        with theirs:
            arguments = [str(theirs.fileno()), str(root), str(rate_hz), str(pid or 0)]
            self._child = subprocess.Popen([sys.executable, "-c", code, *arguments], pass_fds=(theirs.fileno(),),
                                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                           stderr=subprocess.DEVNULL)

    @property
    def pid(self) -> int:
        """Process id of the telemetry process."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._child.poll() is None

    def latest(self) -> dict[str, Any] | None:
        """Return the newest snapshot as plain JSON, without waiting; None when none is fresh.

        Call it once a second or more often: unread messages fill the socket, and then the newest in it is old.
        """
        self._drain()
        if self._message is None or time.monotonic() - self._received_at > FRESH_S:
            return None
        found: dict[str, Any] = self._message["now"]
        return found

    def window(self) -> Window | None:
        """Return the present window as of the newest message, without waiting; None when none is fresh."""
        return _window(self._message) if self.latest() is not None and self._message is not None else None

    def begin(self) -> bool:
        """Begin a new window; True when the process confirmed it."""
        self._mark += 1
        return self._ask({"kind": "begin", "mark": self._mark}, START_TIMEOUT_S) is not None

    def watch(self, pid: int) -> bool:
        """Watch the memory of this process from now on, in the window that is open; True when confirmed."""
        return self._ask({"kind": "watch", "pid": pid}, ANSWER_TIMEOUT_S) is not None

    def end(self) -> Window | None:
        """Take one more snapshot and return the window; None when the process does not answer: UNKNOWN."""
        message = self._ask({"kind": "end"}, ANSWER_TIMEOUT_S)
        return _window(message) if message is not None and message["mark"] == self._mark else None

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
        token = next(self._tokens)
        self._drain()  # or the answer finds no room
        try:
            self._ours.send(json.dumps({**request, "token": token}).encode(), socket.MSG_NOSIGNAL)
        except OSError:
            return None
        until = time.monotonic() + timeout_s
        while (rest := until - time.monotonic()) > 0:
            if select.select([self._ours], [], [], rest)[0]:
                message = self._receive()
                if message is None:
                    return None
                if message["token"] == token:
                    return message
        return None

    def _drain(self) -> None:
        while select.select([self._ours], [], [], 0)[0]:
            if self._receive() is None:
                return

    def _receive(self) -> dict[str, Any] | None:
        """Take one message; None when the process is gone."""
        try:
            raw = self._ours.recv(MAX_MESSAGE)
        except OSError:
            return None
        if not raw:
            return None
        message: dict[str, Any] = json.loads(raw)
        self._message, self._received_at = message, message["now"]["at_ns"] / 1e9
        return message

    def close(self) -> None:
        """End the process: it leaves when this end is closed, and is killed when it does not."""
        self._ours.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=2)
        if self._child.poll() is None:
            self._child.kill()
            self._child.wait()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _window(message: dict[str, Any] | None) -> Window | None:
    if message is None:
        return None
    raw = {name: value for name, value in message["window"].items() if name != "rate_hz"}
    pairs = ("hot", "clocks_mhz", "pushed_down", "ceilings_mhz", "rails_mw")
    return Window(**{**raw, **{name: {key: tuple(pair) for key, pair in raw[name].items()} for name in pairs}})

"""`tegrastats` as a child that may hang, talk nonsense or die, without anybody noticing but this file."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

from fmdeploy.errors import DataError
from fmdeploy.jetson.binaries import ENVIRONMENT, find_program
from fmdeploy.jetson.tegrastats import Sample, parse_line

INTERVAL_MS = 100
FRESH_S = 1.0  # a sample older than this is no measurement of now
MAX_BUFFER = 64 * 1024
RESTART_S = 5.0
PR_SET_PDEATHSIG = 1


class TegrastatsStream:
    """The latest sample, or none; `state` says why there is none."""

    def __init__(self, root: Path = Path("/"), *, fresh_s: float = FRESH_S) -> None:
        """Start the program below `root` where there is one."""
        self._path, self._fresh_s = find_program("tegrastats", root), fresh_s
        self._child: subprocess.Popen[bytes] | None = None
        self._sample: Sample | None = None
        self._buffer, self._garbage = b"", False
        self._sample_at = self._started_at = -1e9
        self._start()

    def _start(self) -> None:
        if self._path is None:
            return
        self._started_at = time.monotonic()
        try:
            self._child = subprocess.Popen(
                [self._path, "--interval", str(INTERVAL_MS)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, env=ENVIRONMENT, start_new_session=True, preexec_fn=_die_with_parent)
        except OSError:
            self._child = None
            return
        assert self._child.stdout is not None
        os.set_blocking(self._child.stdout.fileno(), False)

    def poll(self) -> Sample | None:
        """Read what is there without waiting; return the latest sample, None when it is not of now."""
        self._read()
        if self._child is not None and self._child.poll() is not None:
            self._close_pipe()
        if self._child is None and self._path is not None and time.monotonic() - self._started_at > RESTART_S:
            self._start()
        return self._sample if time.monotonic() - self._sample_at <= self._fresh_s else None

    @property
    def state(self) -> str:
        """`absent`, `ok`, `exited`, `garbage` (it writes, but no line of tegrastats) or `silent`."""
        if self._path is None:
            return "absent"
        if time.monotonic() - self._sample_at <= self._fresh_s:
            return "ok"
        if self._child is None:
            return "exited"
        return "garbage" if self._garbage else "silent"

    def _read(self) -> None:
        if self._child is None or self._child.stdout is None:
            return
        try:
            chunk = os.read(self._child.stdout.fileno(), MAX_BUFFER)
        except (BlockingIOError, OSError):
            return
        *lines, rest = (self._buffer + chunk).split(b"\n")
        self._buffer = rest[-MAX_BUFFER:]
        self._garbage |= len(rest) > MAX_BUFFER // 2
        for line in lines[-5:]:  # a flood is not worth parsing to the end
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            self._sample = parse_line(line.decode("utf-8", errors="replace"))
        except DataError:
            self._garbage = True
            return
        self._garbage, self._sample_at = False, time.monotonic()

    def _close_pipe(self) -> None:
        if self._child is not None and self._child.stdout is not None:
            self._child.stdout.close()
        self._child = None

    def close(self) -> None:
        """End the program."""
        if self._child is not None and self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        self._close_pipe()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

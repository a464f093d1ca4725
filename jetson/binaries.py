"""The board's own programs, run with a time limit, and only from below the root that was named."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("usr/bin", "usr/sbin")
TIMEOUT_S = 5.0
MAX_BYTES = 1 << 16  # the longest answer, that of jetson_clocks, has some KiB
ENVIRONMENT = {"LC_ALL": "C", "LANG": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


@dataclass(frozen=True)
class Answer:
    """What a program printed, or why there is nothing.

    Attributes:
        text: Its standard output; None when it is not there, hung, or failed.
        problem: Why; empty when all is well.
    """

    text: str | None
    problem: str = ""


def find_program(name: str, root: Path = Path("/")) -> Path | None:
    """Return a program below `root`; a link that leads out of it is none."""
    for folder in FOLDERS:
        path = root / folder / name
        try:
            inside = path.resolve().is_relative_to(root.resolve())
        except (OSError, RuntimeError):
            continue
        if inside and path.is_file() and os.access(path, os.X_OK):
            return path
    return None


def ask(name: str, *arguments: str, root: Path = Path("/"), timeout_s: float = TIMEOUT_S) -> Answer:
    """Run one of the board's programs and return what it printed; it and its children are killed when it hangs."""
    path = find_program(name, root)
    if path is None:
        return Answer(None, f"{name} is not here")
    try:
        child = subprocess.Popen([path, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL, env=ENVIRONMENT, start_new_session=True)
    except OSError as error:
        return Answer(None, f"{name} does not start: {error.strerror}")
    try:
        output, problem = _collect(child, timeout_s)
    finally:
        _kill(child)
    if problem:
        return Answer(None, f"{name} {problem}")
    if child.returncode != 0:
        return Answer(None, f"{name} ended with code {child.returncode}")
    return Answer(output.decode("utf-8", errors="replace"))


def _collect(child: subprocess.Popen[bytes], timeout_s: float) -> tuple[bytes, str]:
    """What the program prints until it ends, and why that is not all: no more is kept than such a program prints."""
    assert child.stdout is not None
    output, until = b"", time.monotonic() + timeout_s
    while select.select([child.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
        chunk = os.read(child.stdout.fileno(), MAX_BYTES)
        output += chunk
        if len(output) > MAX_BYTES:
            return b"", f"printed more than {MAX_BYTES} bytes"
        if not chunk:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=max(0.0, until - time.monotonic()))
                return output, ""
            break
    return b"", f"did not answer within {timeout_s:g} s"


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End what still runs of it, its children too; a grandchild that left the session may still hold the pipe."""
    if child.returncode is None:  # not reaped, so its group is still its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.stdout is not None:
        child.stdout.close()

"""The board's own programs, run with a time limit, and only from below the root that was named."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("usr/bin", "usr/sbin")
TIMEOUT_S = 5.0
MAX_BYTES = 1 << 20
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
        output, _ = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _kill(child)
        return Answer(None, f"{name} did not answer within {timeout_s:g} s")
    if child.returncode != 0:
        return Answer(None, f"{name} ended with code {child.returncode}")
    return Answer(output[:MAX_BYTES].decode("utf-8", errors="replace"))


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.communicate(timeout=1)  # a grandchild that left the session may still hold the pipe

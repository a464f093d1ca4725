"""Get a missing engine built: by `fmdeploy build` in a process of its own, so that what a build takes is given back.

A build can need several times the memory of the engine and minutes of time. On a Jetson it takes both from everything
else, so it is refused when little memory is left, and it is never begun unless it was asked for. A build outlives a
runtime that is killed meanwhile: it ends with a whole engine, which the next start finds, or with none.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from fmdeploy.errors import FmdeployError, MissingError
from fmdeploy.jetson.machine import available_mib
from fmdeploy.manifest import MANIFEST_NAME
from fmdeploy.runtime.bundle import Bundle
from fmdeploy.runtime.engines.key import Place

TIMEOUT_S = 3600.0
COMMAND = (sys.executable, "-m", "fmdeploy")


def rebuild(
    bundle: Bundle, variant: str, folder: Path, *, place: Place, floor_mib: int,
    timeout_s: float = TIMEOUT_S, command: tuple[str, ...] = COMMAND,
) -> None:
    """Build the engine of one model into `folder`; one with another key stays beside it.

    Args:
        bundle: Holds the model.
        variant: The model file to build from.
        folder: Where engines lie.
        place: The machine.
        floor_mib: With less memory available than this, no build is begun.
        timeout_s: The build is killed after so long.
        command: What starts fmdeploy.

    Raises:
        MissingError: too little memory is left for a build, or there is no place for its engine.
        FmdeployError: the build failed; its last line is in the text.
    """
    left = available_mib(place.root)
    if left is not None and left < floor_mib:
        raise MissingError("too little memory is left to build an engine", where=folder,
                           expected=f"at least {floor_mib} MiB available", found=f"{left} MiB",
                           fix="Build it while nothing else runs: fmdeploy build BUNDLE --out FOLDER")
    if os.path.lexists(folder / MANIFEST_NAME):
        raise MissingError("is one engine, so a new one has no place in it", where=folder,
                           fix="Name the folder in which engines lie")
    out = folder / f"{bundle.artifact.root.name}-{variant}"
    given = [*command, "build", str(bundle.artifact.root), "--out", str(out), "--variant", variant,
             "--timeout-s", str(timeout_s)]
    process = subprocess.Popen(given, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               start_new_session=True)
    try:
        said = process.communicate(timeout=timeout_s + 60)[1].decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        said = f"killed after {timeout_s:g} s"
    finally:
        _kill(process)
    if process.returncode != 0:
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "without a message")
        raise FmdeployError(f"the build of {variant} ended with status {process.returncode}: {last.strip()[:400]}",
                            where=out)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the build and whatever it started, if any of it is still there."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr is not None:
        process.stderr.close()

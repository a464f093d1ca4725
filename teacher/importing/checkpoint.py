"""A foreign `.pt`, `.pth` or `.safetensors` as plain tensors, read by a child process under limits."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fmdeploy.errors import ModelFileError
from fmdeploy.interrupt import hidden_from_children
from fmdeploy.likely import cause_of

GIB = 2**30
MEMORY_FLOOR = 3 * GIB
"""What Python and torch themselves take."""
HEAD_BYTES = 512
READABLE = ("it is a zip archive", "it is a Python pickle")
"""What a torch checkpoint looks like from outside."""
REMEDY = "Save it as safetensors where it was trained: safetensors.torch.save_file(model.state_dict(), ...)"


def read_checkpoint(path: Path, *, max_bytes: int, seconds: float) -> tuple[dict[str, Tensor], dict[str, int]]:
    """All tensors of a checkpoint by their path in it, and counts of what was found.

    Args:
        path: What somebody gave us.
        max_bytes: Most that its file, and its tensors together, may hold.
        seconds: Most that reading may take.

    Raises:
        ModelFileError: it is no plain file, too large, damaged, of another format, or holds code.
    """
    _refuse_file(path, max_bytes)
    with tempfile.TemporaryDirectory(prefix="fmdeploy-import-") as folder:
        target = Path(folder) / "tensors.safetensors"
        reply = _convert(path, target, max_bytes, seconds)
        if "refused" in reply:
            raise ModelFileError(str(reply["refused"]), where=path, fix=REMEDY)
        return load_file(target), {key: int(reply[key]) for key in ("tensors", "others")}


def _refuse_file(path: Path, max_bytes: int) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error.strerror}", where=path, fix="Check the path") from error
    with os.fdopen(handle, "rb") as stream:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError("is not a regular file", where=path)
        if status.st_size > max_bytes:
            raise ModelFileError("is too large", where=path, expected=f"at most {max_bytes} bytes",
                                 found=status.st_size, fix="Allow more with --max-gib")
        cause = cause_of(stream.read(HEAD_BYTES))
    if cause and not cause.startswith(READABLE):
        raise ModelFileError(f"is no torch checkpoint: {cause}", where=path)


def _convert(path: Path, target: Path, max_bytes: int, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "fmdeploy.teacher.importing.child", str(path.absolute()), str(target),
               str(max_bytes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
                   "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with hidden_from_children():
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                 env=environment, cwd=target.parent, start_new_session=True,
                                 preexec_fn=_limits(max_bytes, seconds))
    try:
        said, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise ModelFileError("takes too long to read", where=path, expected=f"at most {seconds:g} s") from error
    finally:
        _end(child)
    try:
        reply = json.loads(said)
    except ValueError:
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
        return {"refused": f"cannot be read within the limits on memory and time: the process that tried ended with "
                           f"{how}"}
    return reply if isinstance(reply, dict) else {"refused": "cannot be read"}


def _end(child: subprocess.Popen[bytes]) -> None:
    """Whatever it started ends with it: it leads a session of its own."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _limits(max_bytes: int, seconds: float) -> Callable[[], None]:
    """What the child may use: reading, cutting into tensors and copying takes three times the file."""
    wanted = {
        resource.RLIMIT_DATA: MEMORY_FLOOR + 3 * max_bytes, resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: max_bytes + 64 * 2**20, resource.RLIMIT_CORE: 0,
    }

    def apply() -> None:
        for what, value in wanted.items():
            hard = resource.getrlimit(what)[1]
            bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(what, (bound, bound))

    return apply

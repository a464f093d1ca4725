"""A build in a process of its own, bounded in time and memory: a crash, a hang and a hungry compiler become a report.

Memory is watched, not limited by the kernel: CUDA reserves so much address space that RLIMIT_AS would refuse to start
it, and what a Jetson's GPU takes is in no process's resident set. So what counts is the child's resident set plus
the growth of NvMapMemUsed (memory of the GPU on a Jetson, absent elsewhere), looked at twenty times a second; and the
machine's available memory must not fall below a floor, since a Jetson's GPU and CPU share it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fmdeploy import interrupt
from fmdeploy.export.tensorrt.builder import NetworkNode, Options, Problem
from fmdeploy.export.tensorrt.child import CACHE, ENGINE, RESULT
from fmdeploy.runtime.backends.tensorrt_api import ApiName

Fate = Literal["done", "crashed", "timeout", "out-of-memory"]
POLL_S = 0.05
KIB_PER_MIB = 1024
PROC = Path("/proc")
CHILD = ("-m", "fmdeploy.export.tensorrt.child")
TAIL = 600  # characters of a crashed child's last words


@dataclass(frozen=True)
class Limits:
    """What a child may use, and what it must leave to the others (`floor_mib`)."""

    timeout_s: float
    memory_mib: int
    floor_mib: int = 128


@dataclass(frozen=True)
class Ended:
    """How a child ended, and what it left.

    Attributes:
        fate: "done" where it wrote a result, of whatever kind.
        problems: What the build complained about, or why there is no result.
        engine: The serialised engine.
        result: The other fields of its result, see `builder.Built`.
    """

    fate: Fate
    problems: tuple[Problem, ...] = ()
    engine: bytes | None = None
    timing_cache: bytes | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def nodes(self) -> tuple[NetworkNode, ...]:
        """Convolutions and matrix products of the parsed network."""
        return tuple(NetworkNode(**node) for node in self.result.get("nodes", ()))


def build_isolated(
    api: ApiName, model: Path, sha256: str, options: Options, limits: Limits, *,
    command: tuple[str, ...] = (sys.executable, *CHILD), proc: Path = PROC,
) -> Ended:
    """Build `model` in a child process; nothing of it outlives this call.

    Args:
        api: The package that the child imports.
        model: A single-file ONNX model.
        sha256: Of its bytes; the child builds these or nothing.
        options: See `builder.Options`.
        limits: The child is killed beyond them.
        command: What starts the child.
        proc: Where the kernel tells about processes and memory.
    """
    with tempfile.TemporaryDirectory(prefix="fmdeploy-build-") as name:
        folder = Path(name)
        cache = _write(folder / "before.cache", options.timing_cache)
        job = {"api": api, "model": str(model.resolve()), "sha256": sha256, "folder": name, "parent": os.getpid(),
               "workspace_mib": options.workspace_mib, "free_dims": options.free_dims,
               "timing_cache": None if cache is None else str(cache)}
        with _child(command, json.dumps(job), folder / "output") as process:
            fate, why = _watch(process, limits, proc)
        if fate != "done":
            return Ended(fate, (Problem("process", why),))
        return _collect(process, folder)


def _write(path: Path, content: bytes | None) -> Path | None:
    if content is None:
        return None
    path.write_bytes(content)
    return path


@contextmanager
def _child(command: tuple[str, ...], job: str, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start the child with the job on its stdin; on the way out it and whatever it started are dead."""
    with output.open("wb") as stream:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stream, stderr=stream,
                                   start_new_session=True)
    try:
        _feed(process, job.encode())
        yield process
    finally:
        _kill(process)


def _feed(process: subprocess.Popen[bytes], job: bytes) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it died at once; its exit code says so
        process.stdin.write(job)
        process.stdin.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _watch(process: subprocess.Popen[bytes], limits: Limits, proc: Path) -> tuple[Fate, str]:
    deadline, before = time.monotonic() + limits.timeout_s, _nvmap_mib(proc)
    while process.poll() is None:
        interrupt.check()
        used = _resident_mib(process.pid, proc) + max(0.0, _nvmap_mib(proc) - before)
        if used > limits.memory_mib:
            return "out-of-memory", f"killed at {used:.0f} MiB, the limit is {limits.memory_mib} MiB"
        if 0 < (left := _available_mib(proc)) < limits.floor_mib:
            return "out-of-memory", f"killed with {left:.0f} MiB left on the machine, floor is {limits.floor_mib} MiB"
        if time.monotonic() > deadline:
            return "timeout", f"killed after {limits.timeout_s:g} s without a result"
        time.sleep(POLL_S)
    return "done", ""


def _resident_mib(pid: int, proc: Path) -> float:
    return _kib_of(proc / str(pid) / "status", "VmRSS:") / KIB_PER_MIB


def _nvmap_mib(proc: Path) -> float:
    return _kib_of(proc / "meminfo", "NvMapMemUsed:") / KIB_PER_MIB


def _available_mib(proc: Path) -> float:
    return _kib_of(proc / "meminfo", "MemAvailable:") / KIB_PER_MIB


def _kib_of(path: Path, key: str) -> int:
    """The number of kB behind `key` in a file of /proc; 0 where it does not say."""
    try:
        lines = path.read_text().splitlines()
    except OSError:  # the process has just ended
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def _collect(process: subprocess.Popen[bytes], folder: Path) -> Ended:
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        said = (folder / "output").read_bytes().decode("utf-8", "replace").strip()[-TAIL:]
        return Ended("crashed", (Problem("process", f"{_ending(process.returncode)}: {' '.join(said.split())}"),))
    engine = (folder / ENGINE).read_bytes() if result["engine_bytes"] is not None else None
    cache = (folder / CACHE).read_bytes() if result["timing_cache_bytes"] is not None else None
    problems = tuple(Problem(**problem) for problem in result.pop("problems"))
    return Ended("done", problems, engine, cache, result)


def _ending(code: int) -> str:
    if code >= 0:
        return f"the build process ended with status {code}"
    try:
        return f"the build process was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"the build process was killed by signal {-code}"

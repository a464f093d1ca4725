"""Runs recording jobs in several worker processes and never leaves one behind."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fmdeploy.data.worker import Job, record_job
from fmdeploy.errors import DataError, FmdeployError
from fmdeploy.interrupt import hidden_from_children

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(jobs: Sequence[Job], folder: Path, *, workers: int) -> Iterator[int]:
    """Record `jobs` into `folder` and yield the frames of each as it finishes, in no particular order.

    One worker means this very process. More are separate processes with one thread each, so that neither an
    unguarded `__main__` nor a loaded torch is inherited.

    Raises:
        DataError: a worker was killed; what it finished is kept.
        OSError: a file could not be written, such as on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield record_job(job, folder)
        return
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    replies: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    with _processes(min(workers, len(jobs))) as processes:
        for process in processes:
            threading.Thread(target=_feed, args=(process, waiting, replies, folder), daemon=True).start()
        for _ in jobs:
            yield _frames(replies.get())


@contextmanager
def _processes(count: int) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "fmdeploy.data.worker"]
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    started: list[subprocess.Popen[str]] = []
    try:
        with hidden_from_children():
            for _ in range(count):
                started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                                env=environment))
        yield started
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):  # a job that was still in the buffer of a killed worker
                        pipe.close()


def _feed(
    process: subprocess.Popen[str], waiting: queue.SimpleQueue[Job], replies: queue.SimpleQueue[dict[str, Any]],
    folder: Path,
) -> None:
    """Give one worker job after job until there are none."""
    assert process.stdin is not None
    assert process.stdout is not None
    while True:
        try:
            job = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            process.stdin.write(job.to_line(folder))
            process.stdin.flush()
            line = process.stdout.readline()
        except (OSError, ValueError):
            line = ""
        replies.put(json.loads(line) if line else {"died": process.wait()})
        if not line:
            return


def _frames(reply: dict[str, Any]) -> int:
    if "frames" in reply:
        return int(reply["frames"])
    if "errno" in reply:
        raise OSError(reply["errno"], reply["error"])
    if "died" in reply:
        raise DataError(f"a recording process ended with status {reply['died']}", where="data record",
                        fix="Run the same command again: it goes on where it stopped")
    raise FmdeployError(f"a recording process failed: {reply['error']}", where="data record")

"""The process that builds: one job from stdin, one result into a folder. Nothing else may share its fate.

    stdin         JSON: api, model (path), sha256, folder, workspace_mib, free_dims, timing_cache (path or null)
    folder/       result.json, engine.plan, timing.cache
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from fmdeploy.export.tensorrt.builder import Built, Options, build_engine
from fmdeploy.runtime.backends.tensorrt_api import load_api
from fmdeploy.runtime.measure.memory import peak_mib

PR_SET_PDEATHSIG = 1
RESULT, ENGINE, CACHE = "result.json", "engine.plan", "timing.cache"


def main() -> None:
    """Run the job; Ctrl-C is the parent's business, and the parent's death is this process's, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = json.loads(sys.stdin.read())
    _die_with(job["parent"])
    folder = Path(job["folder"])
    model = Path(job["model"]).read_bytes()
    if hashlib.sha256(model).hexdigest() != job["sha256"]:
        raise SystemExit("the model changed while it was read")
    cache = Path(job["timing_cache"]) if job["timing_cache"] else None
    options = Options(job["workspace_mib"], tuple(job["free_dims"]),
                      cache.read_bytes() if cache is not None and cache.is_file() else None)
    write_result(build_engine(load_api(job["api"]), model, options), folder)


def write_result(built: Built, folder: Path) -> None:
    """Write the engine and the cache, then what was found: a result names only files that are complete."""
    fields: dict[str, Any] = {f.name: getattr(built, f.name) for f in dataclasses.fields(built)}
    for key, name in (("engine", ENGINE), ("timing_cache", CACHE)):
        content = fields.pop(key)
        fields[f"{key}_bytes"] = None if content is None else len(content)
        if content is not None:
            (folder / name).write_bytes(content)
    fields["peak_mib"] = peak_mib()
    for key in ("problems", "nodes"):
        fields[key] = [dataclasses.asdict(item) for item in fields[key]]
    (folder / RESULT).write_text(json.dumps(fields), encoding="utf-8")


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent is gone: an orphan would hold the device's memory."""
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the line above
        os._exit(1)


if __name__ == "__main__":
    main()

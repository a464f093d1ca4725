"""One fast demo a session; the tests of this folder read its artifacts and never write into them."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fmdeploy import cli
from support.processes import FMDEPLOY


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `fmdeploy demo --fast`, run once however many test processes there are."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    out = shared / "pipeline"
    with (shared / "pipeline.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "summary.json").exists():
            done = subprocess.run([*FMDEPLOY, "demo", "--fast", "--out", str(out)], capture_output=True, text=True)
            (shared / "pipeline.log").write_text(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
            assert done.returncode == 0, done.stdout + done.stderr
    return out


Answer = tuple[int, str, str]


@pytest.fixture
def fmdeploy(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run one command line in this process: exit code, stdout, stderr."""

    def run(*argv: object) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in argv])
        seen = capsys.readouterr()
        return int(stop.value.code or 0), seen.out, seen.err

    return run

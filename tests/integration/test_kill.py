"""kill -9 at random times in every stage: nothing that opens is left, and the resumed run gives the same digest."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from fmdeploy.artifact import open_artifact
from fmdeploy.errors import ArtifactError
from fmdeploy.manifest import Kind
from support.processes import FMDEPLOY

STAGES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "data": (("data", "record"), {}),
    "teacher": (("teacher", "train"), {"data": "data"}),
    "features": (("cache",), {"teacher": "teacher", "data": "data"}),
    "student": (("distill",), {"teacher": "teacher", "features": "features", "data": "data"}),
    "quantized": (("quantize",), {"student": "student", "data": "data"}),
    "bundle": (("export",), {"model": "quantized", "data": "data"}),
}


def toml_of(config: dict[str, Any]) -> str:
    """A configuration file that asks for exactly what a manifest says was asked for."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items() if value is not None)


def command_line(stage: str, pipeline: Path, work: Path) -> list[str]:
    verb, inputs = STAGES[stage]
    config = {k: v for k, v in open_artifact(pipeline / stage).manifest.config.items() if k != "budgets"}
    (work / "config.toml").write_text(toml_of(config))
    flags = [part for flag, folder in inputs.items() for part in (f"--{flag}", str(pipeline / folder))]
    flags += ["--budgets", str(pipeline / "budgets.toml")] if stage == "bundle" else []
    return [*FMDEPLOY, *verb, "--config", str(work / "config.toml"), *flags, "--out", str(work / "out")]


def start(argv: list[str], work: Path) -> subprocess.Popen[bytes]:
    """Start in a process group of its own and wait until the stage itself begins: imports are not what is tested."""
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    while child.poll() is None and not (work / ".out.partial" / ".key").exists() and not (work / "out").exists():
        time.sleep(0.01)
    return child


def kill_after(child: subprocess.Popen[bytes], seconds: float, how: signal.Signals) -> int:
    """Let it go on for `seconds`, then send `how` to all of it; its exit code, 0 when it was faster."""
    try:
        child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, how)
        child.communicate()
    return child.returncode


def finish(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_times_then_resumed_gives_the_same_artifact(
    stage: str, pipeline: Path, tmp_path: Path
) -> None:
    reference = open_artifact(pipeline / stage)
    argv = command_line(stage, pipeline, tmp_path)
    share = random.Random(f"{stage} {time.time()}")
    # The first kill always lands; the second may find a resumed run that is already done.
    delays = [reference.manifest.environment["seconds"] * f * share.random() for f in (0.5, 0.9)]
    codes = []
    for delay in delays:
        codes.append(kill_after(start(argv, tmp_path), delay, signal.SIGKILL))
        if codes[-1] == 0:
            break
        with pytest.raises(ArtifactError):
            open_artifact(tmp_path / "out")
        assert {p.name for p in tmp_path.iterdir()} <= {"config.toml", ".out.partial"}
    assert codes[0] == -signal.SIGKILL, f"nothing was killed after {delays}"
    finish(argv)
    assert open_artifact(tmp_path / "out").digest == reference.digest, f"killed after {delays}"
    assert {p.name for p in tmp_path.iterdir()} == {"config.toml", "out"}


def test_a_killed_check_leaves_nothing_that_opens(pipeline: Path, tmp_path: Path) -> None:
    argv = [*FMDEPLOY, "check", str(pipeline / "bundle"), "--data", str(pipeline / "data"), "--runs", "3000",
            "--out", str(tmp_path / "out")]
    code = kill_after(start(argv, tmp_path), 0.5 * random.Random(time.time()).random(), signal.SIGKILL)
    assert code == -signal.SIGKILL
    with pytest.raises(ArtifactError):
        open_artifact(tmp_path / "out")
    finish(argv[: argv.index("--runs")] + argv[argv.index("--out"):])
    assert open_artifact(tmp_path / "out").kind is Kind.CHECK


@pytest.mark.parametrize("stage", ["data", "teacher", "bundle"])
def test_ctrl_c_is_one_line_and_leaves_nothing_that_opens(stage: str, pipeline: Path, tmp_path: Path) -> None:
    child = start(command_line(stage, pipeline, tmp_path), tmp_path)
    time.sleep(0.3)
    os.killpg(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=60)
    # A shell says 130 to both: CPython kills itself by SIGINT when the interrupt passed through an `exec` (a dataclass).
    assert child.returncode in (130, -signal.SIGINT), err.decode()
    assert err.decode().strip().splitlines()[-1] == "fmdeploy: interrupted; no artifact was left half-written"
    assert b"Traceback" not in err
    with pytest.raises(ArtifactError):
        open_artifact(tmp_path / "out")


def test_a_full_disk_is_one_line_and_leaves_nothing_that_opens(pipeline: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a small tmpfs here (needs root)")
    try:
        for stage in ("features", "bundle"):
            argv = command_line(stage, pipeline, tmp_path)
            argv[argv.index("--out") + 1] = str(disk / stage)
            done = subprocess.run(argv, capture_output=True, text=True)
            assert done.returncode == 3, done.stderr
            assert "the disk is full" in done.stderr.splitlines()[-1]
            with pytest.raises(ArtifactError):
                open_artifact(disk / stage)
            subprocess.run(f"rm -rf {disk}/.*.partial", shell=True, check=True)
    finally:
        subprocess.run(["umount", disk], check=True)

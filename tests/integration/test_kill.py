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
from support.processes import FMDEPLOY

START_S = 6.0  # what importing takes before a stage begins
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
    config = open_artifact(pipeline / stage).manifest.config
    (work / "config.toml").write_text(toml_of(config))
    flags = [part for flag, folder in inputs.items() for part in (f"--{flag}", str(pipeline / folder))]
    return [*FMDEPLOY, *verb, "--config", str(work / "config.toml"), *flags, "--out", str(work / "out")]


def run_for(argv: list[str], seconds: float | None) -> int:
    """Run in a process group of its own, kill all of it after `seconds`; -9 when it was killed."""
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        _, err = child.communicate(timeout=seconds)
        assert child.returncode == 0, err.decode()
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    return child.returncode


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_times_then_resumed_gives_the_same_artifact(
    stage: str, pipeline: Path, tmp_path: Path
) -> None:
    reference = open_artifact(pipeline / stage)
    argv = command_line(stage, pipeline, tmp_path)
    rng = random.Random(f"{stage} {time.time()}")
    delays = [START_S * rng.random() + reference.manifest.environment["seconds"] * rng.random() for _ in range(2)]
    for delay in delays:
        if run_for(argv, delay) == 0:
            break
        with pytest.raises(ArtifactError):
            open_artifact(tmp_path / "out")
        assert {p.name for p in tmp_path.iterdir()} <= {"config.toml", ".out.partial"}
    run_for(argv, None)
    assert open_artifact(tmp_path / "out").digest == reference.digest, f"killed after {delays}"
    assert {p.name for p in tmp_path.iterdir()} == {"config.toml", "out"}


def test_ctrl_c_is_one_line_and_leaves_nothing_that_opens(pipeline: Path, tmp_path: Path) -> None:
    child = subprocess.Popen(command_line("data", pipeline, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.partial").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    os.killpg(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err.decode().strip().splitlines()[-1] == "fmdeploy: interrupted; no artifact was left half-written"
    assert b"Traceback" not in err
    with pytest.raises(ArtifactError):
        open_artifact(tmp_path / "out")

"""Killed or interrupted at random moments, then the same command again: the same artifact."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.distill.distill import distill
from fmdeploy.errors import ArtifactError
from fmdeploy.quantize.quantize import quantize
from fmdeploy.teacher.adapt.adapt import adapt
from fmdeploy.teacher.cache import cache
from fmdeploy.teacher.train import train
from support.processes import FMDEPLOY
from support.training_data import STUDENT, TEACHER, write_scenes


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, and a whole `teacher`, `features` and `student`."""
    folder = tmp_path_factory.mktemp("killed")
    write_scenes(folder / "data", sequences=64)
    train(**_teacher(folder, folder / "teacher"))
    cache(**_cache(folder, folder / "features"))
    distill(**_student(folder, folder / "student"))
    quantize(**_quantized(folder, folder / "quantized"))
    adapt(**_adapter(folder, folder / "adapter"))
    return folder


def _adapter(home: Path, out: Path) -> dict[str, Any]:
    return {"teacher": home / "teacher", "data": home / "data", "out": out, "steps": 120, "checkpoint_every": 7,
            "batch": 4, "precision": "fp32", "ema": 0.9}


def _teacher(home: Path, out: Path) -> dict[str, Any]:
    return {"data": home / "data", "out": out, "steps": 80, "checkpoint_every": 7, "ema": 0.9, **TEACHER}


def _cache(home: Path, out: Path) -> dict[str, Any]:
    return {"data": home / "data", "teacher": home / "teacher", "out": out, "per_shard": 4, "precision": "fp32"}


def _student(home: Path, out: Path) -> dict[str, Any]:
    return {"data": home / "data", "teacher": home / "teacher", "features": home / "features", "out": out,
            "labels": 0.5, "checkpoint_every": 7, "ema": 0.9, **STUDENT, "steps": 150}


def _quantized(home: Path, out: Path) -> dict[str, Any]:
    return {"data": home / "data", "student": home / "student", "teacher": home / "teacher",
            "features": home / "features", "out": out, "mode": "qad", "steps": 90, "batch": 4, "checkpoint_every": 7,
            "validate_every": 10, "patience": 0, "learn_scales": True, "calibration_samples": 8, "precision": "fp32"}


def _flags(options: dict[str, Any]) -> list[str]:
    flags = {"--" + name.replace("_", "-"): value for name, value in options.items()}
    return [part for flag, value in flags.items() for part in ((flag,) if value is True else (flag, str(value)))]


def _num_lines(partial: Path) -> int:
    log = partial / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def _has_begun(partial: Path) -> int:
    return int((partial / ".key").exists())


def _num_shards(partial: Path) -> int:
    return len(list(partial.glob("features/*/[0-9]*.safetensors")))


def _stop(
    verb: list[str], options: dict[str, Any], done: Callable[[Path], int], moment: int, how: signal.Signals
) -> tuple[int, str]:
    """Start the command as a user would and end it by the signal `how` when `done` has reached `moment`, plus a breath.

    Returns:
        Its exit code and what it said on stderr.
    """
    out = options["out"]
    with subprocess.Popen([*FMDEPLOY, *verb, *_flags(options)], stderr=subprocess.PIPE, text=True) as process:
        while done(out.parent / f".{out.name}.partial") < moment and process.poll() is None:
            time.sleep(0.002)
        time.sleep(random.random() * 0.05)
        if process.poll() is None:
            os.kill(process.pid, how)
        _, said = process.communicate()
    assert process.returncode != 0, "it ended before it could be stopped"
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "options", "stage", "done", "total", "whole"), [
    (["teacher", "train"], _teacher, train, _num_lines, 80, "teacher"),
    (["cache"], _cache, cache, _num_shards, 36, "features"),
    (["distill"], _student, distill, _num_lines, 150, "student"),
    (["quantize"], _quantized, quantize, _num_lines, 90, "quantized"),
])
def test_killed_and_run_again_gives_the_same_artifact(
    home: Path, tmp_path: Path, verb: list[str], options: Callable[[Path, Path], dict[str, Any]],
    stage: Callable[..., Artifact], done: Callable[[Path], int], total: int, whole: str,
) -> None:
    chosen = options(home, tmp_path / "out")
    moment = random.randint(1, total // 2)
    _stop(verb, chosen, done, moment, signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ArtifactError):
        open_artifact(tmp_path / "out")
    kept = done(tmp_path / ".out.partial")
    assert moment <= kept < total
    assert stage(**chosen).digest == open_artifact(home / whole).digest
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "options", "stage", "total", "whole"), [
    (["teacher", "adapt"], _adapter, adapt, 120, "adapter"),
    (["distill"], _student, distill, 150, "student"),
])
def test_ctrl_c_again_and_again_is_one_line_each_and_gives_the_same_artifact(
    home: Path, tmp_path: Path, verb: list[str], options: Callable[[Path, Path], dict[str, Any]],
    stage: Callable[..., Artifact], total: int, whole: str,
) -> None:
    """Before the first step, between two, and in the run that went on."""
    chosen, early, late = options(home, tmp_path / "out"), random.randint(8, total // 3), 2 * total // 3
    for done, moment in ((_has_begun, 1), (_num_lines, early), (_num_lines, late)):
        code, said = _stop(verb, chosen, done, moment, signal.SIGINT)
        # A shell says 130 to both: CPython kills itself by SIGINT when the interrupt passed through an `exec`.
        assert code in (130, -signal.SIGINT), said
        assert "Traceback" not in said
        assert said.splitlines()[-1] == "fmdeploy: interrupted; no artifact was left half-written"
        with pytest.raises(ArtifactError):
            open_artifact(tmp_path / "out")
    assert _num_lines(tmp_path / ".out.partial") < total
    found = stage(**chosen)
    assert found.manifest.environment["training"]["steps"] < total - early, "it began anew"
    assert found.digest == open_artifact(home / whole).digest
    assert not (tmp_path / ".out.partial").exists()

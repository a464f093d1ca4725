"""Bad input to every stage: one line, the right exit code, nothing written, inputs untouched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fmdeploy.artifact import open_artifact

Fmdeploy = Callable[..., tuple[int, str, str]]

# Command line with {good} folders of the pipeline, {bad} the broken one, {out} the target; what it is instead.
STAGES = {
    "teacher": ("teacher", "train", "--data", "{bad}"),
    "cache-teacher": ("cache", "--teacher", "{bad}", "--data", "{good}/data"),
    "cache-data": ("cache", "--teacher", "{good}/teacher", "--data", "{bad}"),
    "distill-teacher": ("distill", "--teacher", "{bad}", "--data", "{good}/data"),
    "distill-features": ("distill", "--teacher", "{good}/teacher", "--features", "{bad}", "--data", "{good}/data"),
    "quantize": ("quantize", "--student", "{bad}", "--data", "{good}/data"),
    "export": ("export", "--model", "{bad}", "--data", "{good}/data"),
    "check": ("check", "{bad}", "--data", "{good}/data"),
}
RIGHT = {"teacher": "data", "cache-teacher": "teacher", "cache-data": "data", "distill-teacher": "teacher",
         "distill-features": "features", "quantize": "student", "export": "quantized", "check": "bundle"}


def attempt(fmdeploy: Fmdeploy, stage: str, good: Path, bad: Path, out: Path) -> tuple[int, str]:
    argv = [part.format(good=good, bad=bad) for part in STAGES[stage]]
    code, stdout, err = fmdeploy(*argv, "--out", out)
    assert stdout == ""
    lines = [line for line in err.splitlines() if line.startswith("fmdeploy: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert sorted(p.name for p in out.parent.iterdir()) == ["bad"], "something was left behind"
    return code, lines[0]


def broken_copy(source: Path, bad: Path, how: str) -> None:
    shutil.copytree(source, bad)
    victim = max((p for p in bad.rglob("*") if p.is_file() and p.name != "manifest.json"), key=lambda p: p.stat().st_size)
    raw = bytearray(victim.read_bytes())
    if how == "altered":
        raw[len(raw) // 2] ^= 1
    elif how == "truncated":
        raw = raw[: len(raw) // 2]
    elif how == "incomplete":
        victim.unlink()
        return
    victim.write_bytes(bytes(raw))


@pytest.mark.parametrize("how", ["missing", "foreign", "altered", "truncated", "incomplete", "empty"])
@pytest.mark.parametrize("stage", STAGES)
def test_broken_artifacts_are_refused(stage: str, how: str, pipeline: Path, tmp_path: Path, fmdeploy: Fmdeploy) -> None:
    bad, right = tmp_path / "bad", RIGHT[stage]
    if how == "foreign":
        shutil.copytree(pipeline / ("student" if right == "teacher" else "teacher"), bad)
    elif how == "empty":
        bad.mkdir()
    elif how != "missing":
        broken_copy(pipeline / right, bad, how)
    else:
        (tmp_path / "bad").touch()
    code, line = attempt(fmdeploy, stage, pipeline, bad, tmp_path / "out")
    said = {"missing": "manifest", "foreign": "another kind", "altered": "altered", "truncated": "another size",
            "incomplete": "lacks the file", "empty": "not an fmdeploy artifact"}[how]
    assert code == 2
    assert said in line


@pytest.mark.parametrize("stage", ["teacher", "quantize", "export", "check"])
def test_unknown_keys_and_wrong_types_are_refused(
    stage: str, pipeline: Path, tmp_path: Path, fmdeploy: Fmdeploy
) -> None:
    (tmp_path / "c.toml").write_text('sead = 1\nseed = "one"\n')
    argv = [part.format(good=pipeline, bad=pipeline / RIGHT[stage]) for part in STAGES[stage]]
    code, _, err = fmdeploy(*argv, "--out", tmp_path / "out", "--config", tmp_path / "c.toml")
    assert code == 2
    assert "unknown key 'sead'" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_foreign_cache_is_refused(pipeline: Path, tmp_path: Path, fmdeploy: Fmdeploy) -> None:
    config = open_artifact(pipeline / "teacher").manifest.config
    toml = "".join(f"{k} = {json.dumps(v)}\n" for k, v in {**config, "steps": 1, "seed": 9}.items() if v is not None)
    (tmp_path / "c.toml").write_text(toml)
    code, _, err = fmdeploy("teacher", "train", "--config", tmp_path / "c.toml", "--data", pipeline / "data",
                            "--out", tmp_path / "other")
    assert code == 0, err
    code, _, err = fmdeploy("distill", "--teacher", tmp_path / "other", "--features", pipeline / "features",
                            "--data", pipeline / "data", "--out", tmp_path / "out", "--steps", 1)
    assert code == 2
    assert "teacher" in err
    assert not (tmp_path / "out").exists()


def test_inputs_are_never_touched(pipeline: Path) -> None:
    for folder in ("data", "teacher", "features", "student", "quantized", "bundle", "check"):
        open_artifact(pipeline / folder)

"""The `data` verbs as a user meets them: exit codes, one line on errors, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fmdeploy.data.format import open_dataset
from fmdeploy.data.record import record


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fmdeploy", "data", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "data"
    record(out=str(out), simulations=5, frames=12, workers=1, scenarios=["merge", "u-turn"])
    return out


def test_audit_of_clean_data_exits_0(data: Path) -> None:
    done = run("audit", str(data), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_audit_of_misused_samples_exits_1_and_names_them(data: Path, tmp_path: Path) -> None:
    sample = f"{open_dataset(data).splits['test'][0]}/3"
    used = tmp_path / "calibration.json"
    used.write_text(json.dumps({"samples": [sample]}))
    done = run("audit", str(data), "--against", str(used))
    assert done.returncode == 1
    assert sample in done.stdout
    parsed = run("audit", str(data), "--against", str(used), "--json")
    assert parsed.returncode == 1
    [leak] = json.loads(parsed.stdout)
    assert leak["trap"] == "calibration sample"
    assert leak["samples"][0] == sample


def test_leaking_split_exits_1_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    one = open_dataset(data).sequences[0].id
    done = run("split", "--data", str(data), "--out", str(tmp_path / "x"), "--by", "sequence", "--test-values", one)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert one in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_split_and_info_agree(data: Path, tmp_path: Path) -> None:
    done = run("split", "--data", str(data), "--out", str(tmp_path / "x"), "--by", "scenario", "--test-values", "merge")
    assert done.returncode == 0, done.stderr
    told = run("info", "--data", str(tmp_path / "x"), "--json")
    assert told.returncode == 0, told.stderr
    counts = json.loads(told.stdout)
    assert counts["splits"]["test"]["sequences"] == counts["by"]["scenario"]["merge"]["sequences"] == 6
    assert counts["splits"]["val"]["sequences"] == 0


@pytest.mark.parametrize(("arguments", "text"), [
    (("record", "--out", "x", "--simulations", "1"), "1 simulations are too few"),
    (("record", "--simulations", "1"), "'out' is required"),
    (("record", "--out", "x", "--scenarios", "moon"), "moon"),
    (("audit", "nowhere"), "nowhere: no such artifact"),
    (("info", "--data", "/"), "is not an fmdeploy artifact"),
    (("split", "--data", "nowhere", "--out", "x", "--val", "0.7", "--test", "0.7"), "leave something to train on"),
])
def test_bad_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], text: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr

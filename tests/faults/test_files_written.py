"""Writers that are killed (F10), and the validator under mutated files: short runs of benchmarks/fuzz.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.fdti import Fdti

CASES, KILLS = 400, 25


def run_fuzz(root: Path, *flags: object) -> tuple[int, dict[str, Any]]:
    done = subprocess.run([sys.executable, str(root / "benchmarks" / "fuzz.py"), *map(str, flags)], capture_output=True,
                          text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def fuzzed(root: Path) -> dict[str, Any]:
    code, found = run_fuzz(root, "--count", CASES, "--kills", KILLS)
    assert code in (0, 1)
    return found


def test_F10_killed_writers_leave_nothing_torn(fuzzed: dict[str, Any], fdti: Fdti) -> None:
    writers = fuzzed["writers"]
    assert writers["kills"] == KILLS
    assert writers["torn_loads"] == 0
    assert writers["unfinished_refused"] > 0, "no kill hit a write: the test proves nothing"
    fdti.report(1e3 * writers["seconds"] / KILLS, "a kill and a look at everything it left, per kill")


def test_F10_control_finished_writes_open(fuzzed: dict[str, Any]) -> None:
    assert fuzzed["writers"]["whole_loads"] > 0


def test_mutated_files_neither_crash_nor_hang_nor_write(fuzzed: dict[str, Any]) -> None:
    found = fuzzed["validator"]
    assert found["cases"] == CASES
    assert (found["crashes"], found["hangs"], found["forbidden_acts"], found["files_outside"]) == (0, 0, 0, 0)
    assert found["refused"] > CASES / 2
    assert found["slowest_ms"] < 2000


def test_the_counters_count_what_is_planted(root: Path) -> None:
    code, found = run_fuzz(root, "--planted")
    planted = found["planted"]
    assert code == 1
    assert (planted["crashes"], planted["hangs"], planted["files_outside"]) == (2, 1, 1)
    assert planted["forbidden_acts"] >= 1

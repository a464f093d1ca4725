"""`fmdeploy run --json` as a program sees it: one JSON line a frame on stdout, codes, nothing on disk without --out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.command import Outcome
from fmdeploy.data.format import open_dataset
from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.jsonlines import emit, records_to, somebody_listens
from fmdeploy.runtime.run import run
from support.runtimes import toy_bundle
from support.toy_task import ToyTask, make_dataset

ROOT = Path(__file__).resolve().parents[2]
TASK = "support.toy_task:ToyTask"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "data").root


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    inputs, targets = ToyTask().samples(open_dataset(data), "test").batch(np.arange(6))
    inputs["lidar"][2, 0, 0, 0] = np.nan
    folder = tmp_path_factory.mktemp("bad") / "bad"
    write_arrays(folder, {**inputs, **targets}, {"test": np.arange(6)})
    return folder


def fmdeploy(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.run([sys.executable, "-m", "fmdeploy", *map(str, arguments)], cwd=cwd, env=environment, text=True,
                          capture_output=True, check=False, timeout=120)


def test_one_line_a_frame_and_nothing_on_disk(data: Path, tmp_path: Path) -> None:
    done = fmdeploy("run", toy_bundle(), "--data", data, "--task", TASK, "--limit", 5, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["seq"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["id"] for line in lines] == list(ToyTask().samples(open_dataset(data), "test").ids[:5])
    for line in lines:
        assert line["valid"] is True
        assert line["state"] == "ACTIVE"
        assert line["reasons"] == []
        assert line["age_ms"] > 0
    assert lines[-1]["counters"]["valid"] == 5
    assert list(tmp_path.iterdir()) == []


def test_lines_and_folder_are_the_same_records(bad_data: Path, tmp_path: Path) -> None:
    done = fmdeploy("run", toy_bundle(), "--data", bad_data, "--task", TASK, "--json", "--keep-going", "--out", "p",
                    cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "p" / "frames.jsonl").read_text()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["valid"] for line in lines] == [True, True, False, True, True, True]
    assert lines[2]["reasons"] == ["NOT_FINITE"]


def test_a_frame_that_is_not_valid_stops_it_after_its_line(bad_data: Path, tmp_path: Path) -> None:
    done = fmdeploy("run", toy_bundle(), "--data", bad_data, "--task", TASK, "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert [json.loads(line)["valid"] for line in done.stdout.splitlines()] == [True, True, False]
    assert "sample test-2/0: NOT_FINITE lidar" in done.stderr


def test_without_json_the_summary(data: Path, tmp_path: Path) -> None:
    done = fmdeploy("run", toy_bundle(), "--data", data, "--task", TASK, "--limit", 3, "--tiers", "fp32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "3 frames on fp32, 0 not valid"


def test_python_callers_get_the_summary(data: Path) -> None:
    found = run(bundle=toy_bundle(), data=data, task=TASK, limit=2)
    assert isinstance(found, Outcome)
    assert (found.data["frames"], found.data["out"], found.data["invalid"]) == (2, None, 0)


def test_records_go_where_somebody_listens() -> None:
    seen: list[str] = []
    record: dict[str, Any] = {"b": 1, "a": None}
    emit(record)
    with records_to(seen.append):
        assert somebody_listens()
        emit(record)
        with records_to(None):
            emit({"lost": True})
    assert not somebody_listens()
    assert seen == ['{"a": null, "b": 1}']

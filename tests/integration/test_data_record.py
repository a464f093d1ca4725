"""Recording in real processes: the same bytes for any number of workers, through kills and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from fmdeploy.artifact import open_artifact
from fmdeploy.data.format import open_dataset
from fmdeploy.data.record import record
from fmdeploy.errors import ArtifactError

SIZE = ["--simulations", "10", "--frames", "12", "--seed", "3"]


def start(out: Path, *, workers: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fmdeploy", "data", "record", "--out", str(out), *SIZE, "--workers", str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the recording made in one process without interruption."""
    out = tmp_path_factory.mktemp("reference") / "data"
    return record(out=str(out), simulations=10, frames=12, seed=3, workers=1).digest


def scratch_of(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def wait_for_simulations(process: subprocess.Popen[str], out: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(scratch_of(out).glob("work/simulations/*.done"))) < count:
        assert process.poll() is None, "the recording ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def children(process: subprocess.Popen[str]) -> list[int]:
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(number) for number in text.split()]


def wait_until_gone(pids: list[int]) -> None:
    """Ended, or dead and waiting for an init process that does not reap."""
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)


def finish(out: Path, *, workers: int) -> str:
    process = start(out, workers=workers)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return open_artifact(out).digest


def test_digest_does_not_depend_on_the_number_of_workers(reference: str, tmp_path: Path) -> None:
    assert finish(tmp_path / "two", workers=2) == reference
    assert finish(tmp_path / "three", workers=3) == reference


def test_another_seed_is_another_dataset(reference: str, tmp_path: Path) -> None:
    assert record(out=str(tmp_path / "x"), simulations=10, frames=12, seed=4, workers=1).digest != reference


@pytest.mark.parametrize("after", [1, 5])
def test_kill_9_leaves_nothing_that_opens_and_resumes_to_the_same_digest(
    reference: str, tmp_path: Path, after: int
) -> None:
    out = tmp_path / "data"
    process = start(out, workers=2)
    wait_for_simulations(process, out, after)
    workers = children(process)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    wait_until_gone(workers)
    assert not out.exists()
    with pytest.raises(ArtifactError):
        open_artifact(scratch_of(out))
    kept = {path.name: path.stat().st_mtime_ns for path in scratch_of(out).glob("work/simulations/*.done")}
    assert len(kept) >= after
    process = start(out, workers=2)
    wait_for_simulations(process, out, len(kept))
    for name, stamp in kept.items():  # what was finished is not recorded again
        path = scratch_of(out) / "work/simulations" / name
        assert not path.exists() or path.stat().st_mtime_ns == stamp
    _, errors = process.communicate(timeout=300)
    assert "resuming" in errors
    assert open_artifact(out).digest == reference
    assert not scratch_of(out).exists()


def test_a_killed_worker_is_reported_and_its_recording_can_go_on(reference: str, tmp_path: Path) -> None:
    out = tmp_path / "data"
    process = start(out, workers=2)
    wait_for_simulations(process, out, 1)
    os.kill(children(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.strip().splitlines()[-1].startswith("fmdeploy: data record: a recording process ended with status -9")
    assert "Traceback" not in errors
    assert not out.exists()
    assert finish(out, workers=2) == reference


def test_ctrl_c_leaves_no_artifact_and_no_process(tmp_path: Path) -> None:
    out = tmp_path / "data"
    process = start(out, workers=2)
    wait_for_simulations(process, out, 1)
    workers = children(process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    wait_until_gone(workers)
    assert not out.exists()


def test_the_same_request_is_not_recorded_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"out": str(tmp_path / "x"), "simulations": 3, "frames": 3, "workers": 2, "val": 0, "test": 0,
               "scenarios": ["two-way"]}
    first = record(**options)
    again = record(**{**options, "workers": 1})
    assert "is up to date" in capsys.readouterr().err
    assert first.digest == again.digest
    with pytest.raises(ArtifactError, match="already holds another artifact"):
        record(**{**options, "seed": 1})


def test_shards_are_webdataset_tars_without_traces_of_the_machine(tmp_path: Path) -> None:
    record(out=str(tmp_path / "x"), simulations=2, frames=3, workers=1, val=0, test=0.5, scenarios=["two-way", "exit"])
    data = open_dataset(tmp_path / "x")
    with tarfile.open(data.artifact.path("shards/00000.tar")) as tar:
        members = tar.getmembers()
    assert [m.name for m in members[:2]] == [f"{data.sequences[0].id}.npz", f"{data.sequences[0].id}.json"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert set(data.splits) == {"train", "val", "test"}

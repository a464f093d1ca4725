"""Artifacts: what is written opens; what was touched does not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmdeploy import draft as draft_module
from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.config import InputPath, OutputPath, StageConfig
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ArtifactError, NoSpaceError
from fmdeploy.manifest import Kind


class Config(StageConfig):
    out: OutputPath
    source: InputPath | None = None
    seed: int = 0


def make(out: Path, files: dict[str, bytes], *, seed: int = 0, inputs: dict[str, Artifact] | None = None,
         kind: Kind = Kind.DATASET) -> Artifact:
    def build(draft: Draft) -> None:
        for name, content in files.items():
            draft.path(name).write_bytes(content)
        draft.note(seconds_of_this_run=time.monotonic())

    return produce(out, kind, stage="test", config=Config(out=out, seed=seed), inputs=inputs or {}, build=build)


names = st.text("abcdefgh012", min_size=1, max_size=6).map(lambda s: f"{s}.bin")
contents = st.dictionaries(names | names.map(lambda n: f"sub/{n}"), st.binary(max_size=300), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(contents)
def test_round_trip_keeps_every_byte_and_the_digest(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = make(Path(folder, "a"), files), make(Path(folder, "b"), files)
        opened = open_artifact(first.root, Kind.DATASET)
        assert {n: opened.path(n).read_bytes() for n in opened.manifest.files} == files
        assert first.digest == second.digest == opened.digest
        assert first.manifest.environment != second.manifest.environment


@settings(max_examples=120, deadline=None)
@given(contents, st.data())
def test_any_flipped_bit_anywhere_is_refused(files: dict[str, bytes], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        artifact = make(Path(folder, "a"), {**files, "x.bin": b"at least one byte"})
        target = data.draw(st.sampled_from(sorted(p for p in artifact.root.rglob("*") if p.is_file())))
        raw = bytearray(target.read_bytes())
        if not raw:
            return
        place = data.draw(st.integers(0, 10**9)) % len(raw)  # timings change the length
        raw[place] ^= 1 << data.draw(st.integers(0, 7))
        if target.name == "manifest.json" and _same_json(target.read_bytes(), bytes(raw)):
            return  # white space
        target.write_bytes(bytes(raw))
        with pytest.raises(ArtifactError):
            open_artifact(artifact.root)


def _same_json(a: bytes, b: bytes) -> bool:
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


@pytest.fixture
def sample(tmp_path: Path) -> Artifact:
    return make(tmp_path / "a", {"one.bin": b"1", "sub/two.bin": b"22"})


def test_missing_extra_truncated_and_linked_files_are_refused(sample: Artifact) -> None:
    one = sample.root / "one.bin"
    (sample.root / "extra").write_bytes(b"")
    with pytest.raises(ArtifactError, match="does not list: extra"):
        open_artifact(sample.root)
    (sample.root / "extra").unlink()
    one.write_bytes(b"")
    with pytest.raises(ArtifactError, match="another size.*expected 1, found 0"):
        open_artifact(sample.root)
    one.unlink()
    with pytest.raises(ArtifactError, match=r"lacks the file one\.bin"):
        open_artifact(sample.root)
    (sample.root.parent / "elsewhere").write_bytes(b"1")
    one.symlink_to(sample.root.parent / "elsewhere")
    with pytest.raises(ArtifactError, match="not a regular file"):
        open_artifact(sample.root)


def test_fifo_in_place_of_a_file_does_not_hang(sample: Artifact) -> None:
    (sample.root / "one.bin").unlink()
    os.mkfifo(sample.root / "one.bin")
    with pytest.raises(ArtifactError, match="not a regular file"):
        open_artifact(sample.root)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "strict JSON"),
        ("[]", "not a JSON object"),
        ('{"schema_version": 1, "schema_version": 1}', "duplicate key"),
        ('{"schema_version": NaN}', "NaN"),
        ('{"schema_version": 2}', "another schema version"),
        ('{"schema_version": 1}', "not valid at"),
        ("[" * 100_000, "strict JSON"),
        ("\ufeff{}", "strict JSON"),
    ],
)
def test_garbage_manifests_are_refused_in_one_line(sample: Artifact, text: str, said: str) -> None:
    (sample.root / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=said) as caught:
        open_artifact(sample.root)
    assert "\n" not in str(caught.value)


def test_a_file_name_that_leaves_the_folder_is_refused(sample: Artifact) -> None:
    path = sample.root / "manifest.json"
    body: dict[str, Any] = json.loads(path.read_text())
    body["files"]["../outside"] = body["files"].pop("one.bin")
    path.write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match="leaves the artifact"):
        open_artifact(sample.root)


def test_missing_foreign_and_nonartifact_are_told_apart(sample: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such artifact"):
        open_artifact(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        open_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="expected TEACHER or STUDENT, found DATASET"):
        open_artifact(sample.root, Kind.TEACHER, Kind.STUDENT)


def test_the_same_request_is_skipped_and_another_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make(tmp_path / "a", {"x": b"1"})
    written = (first.root / "x").stat().st_mtime_ns
    again = make(tmp_path / "a", {"x": b"never written"})
    assert again.digest == first.digest
    assert (first.root / "x").stat().st_mtime_ns == written
    assert "up to date" in capsys.readouterr().err
    with pytest.raises(ArtifactError, match="already holds another artifact"):
        make(tmp_path / "a", {"x": b"1"}, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ArtifactError, match="not an fmdeploy artifact"):
        make(tmp_path / "mine", {"x": b"1"})
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_the_skip_verifies_what_it_returns(tmp_path: Path) -> None:
    first = make(tmp_path / "a", {"x": b"1"})
    (first.root / "x").write_bytes(b"2")
    with pytest.raises(ArtifactError, match="was altered"):
        make(tmp_path / "a", {"x": b"1"})


def test_lineage_travels_with_the_child(tmp_path: Path) -> None:
    data = make(tmp_path / "data", {"x": b"1"})
    teacher = make(tmp_path / "t", {"x": b"2"}, inputs={"data": data}, kind=Kind.TEACHER)
    student = make(tmp_path / "s", {"x": b"3"}, inputs={"teacher": teacher, "data": data}, kind=Kind.STUDENT)
    shutil.rmtree(teacher.root)
    parent = open_artifact(student.root).inputs["teacher"]
    assert (parent.digest, parent.inputs["data"].digest) == (teacher.digest, data.digest)


def test_paths_do_not_change_the_digest(tmp_path: Path) -> None:
    for name in ("a", "b"):
        produce(tmp_path / name, Kind.DATASET, stage="s", inputs={}, build=lambda d: d.write_text("x", "1"),
                config=Config(out=tmp_path / name, source=tmp_path / name))
    assert open_artifact(tmp_path / "a").digest == open_artifact(tmp_path / "b").digest


def test_a_failing_stage_leaves_nothing(tmp_path: Path) -> None:
    def build(draft: Draft) -> None:
        draft.write_text("half", "written")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        produce(tmp_path / "a", Kind.DATASET, stage="s", config=Config(out=tmp_path), inputs={}, build=build)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_takes_no_folders_is_one_typed_line() -> None:
    with pytest.raises(ArtifactError, match=r"/proc/a: cannot be made there\. Choose another --out"):
        make(Path("/proc/a"), {"x": b"1"})


def test_work_files_and_dot_files_are_dropped(tmp_path: Path) -> None:
    def build(draft: Draft) -> None:
        draft.write_text("work/checkpoint", "1")
        draft.write_text(".hidden", "1")
        draft.write_tensors("kept.safetensors", {"a": np.arange(6).reshape(2, 3).T})

    artifact = produce(tmp_path / "a", Kind.DATASET, stage="s", config=Config(out=tmp_path), inputs={}, build=build)
    assert set(artifact.manifest.files) == {"kept.safetensors"}
    assert np.array_equal(artifact.tensors("kept.safetensors")["a"], np.arange(6).reshape(2, 3).T)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a small tmpfs here (needs root)")
    try:
        with pytest.raises(NoSpaceError, match="disk is full"):
            make(disk / "a", {"big": b"0" * 2**20})
        assert list(disk.iterdir()) == []

        def build(draft: Draft) -> None:  # safetensors hides the OSError in an error of its own
            draft.write_tensors("big.safetensors", {"x": np.zeros(2**20, np.uint8)})

        with pytest.raises(NoSpaceError, match="disk is full"):
            produce(disk / "b", Kind.DATASET, stage="s", config=Config(out=disk), inputs={}, build=build)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from test_artifact import Config
from fmdeploy.draft import produce
from fmdeploy.manifest import Kind
def build(draft):
    for number in range(200):
        path = draft.path(f"part-{{number:03d}}")
        if not path.exists():
            half = draft.path("work/now"); half.write_text(str(number)); time.sleep(0.003); half.rename(path)
produce(Path({out!r}), Kind.DATASET, stage="s", config=Config(out=Path("x")), inputs={{}}, build=build, resumable=True)
"""


def test_killed_at_random_times_then_resumed_gives_the_same_artifact(tmp_path: Path) -> None:
    def code(out: Path) -> list[str]:
        return [sys.executable, "-c", CHILD.format(here=str(Path(__file__).parent), out=str(out))]

    subprocess.run(code(tmp_path / "whole"), check=True, capture_output=True)
    for delay in (0.5, 0.55, 0.65):
        child = subprocess.Popen(code(tmp_path / "cut"), stderr=subprocess.DEVNULL)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        if (tmp_path / "cut").exists():
            break
        with pytest.raises(ArtifactError):
            open_artifact(tmp_path / "cut")
    subprocess.run(code(tmp_path / "cut"), check=True, capture_output=True)
    assert open_artifact(tmp_path / "cut").digest == open_artifact(tmp_path / "whole").digest


def test_two_writers_of_one_target_are_told_apart(tmp_path: Path) -> None:
    def inner(draft: Draft) -> None:
        draft.write_text("x", "1")
        with pytest.raises(ArtifactError, match="being written by another process"):
            produce(tmp_path / "a", Kind.DATASET, stage="s", config=Config(out=tmp_path), inputs={}, build=inner)

    produce(tmp_path / "a", Kind.DATASET, stage="s", config=Config(out=tmp_path), inputs={}, build=inner)
    assert open_artifact(tmp_path / "a").path("x").read_text() == "1"


def test_a_writer_that_comes_second_takes_what_the_first_one_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(tmp_path / "a", {"x": b"1"})
    real, asked = draft_module._finished, []

    def blind_once(*arguments: Any) -> Artifact | None:
        asked.append(1)
        return None if len(asked) == 1 else real(*arguments)  # as if the first writer had finished just now

    monkeypatch.setattr(draft_module, "_finished", blind_once)
    assert make(tmp_path / "a", {"x": b"never written"}).digest == first.digest
    assert {p.name for p in tmp_path.iterdir()} == {"a"}


def test_a_resumable_stage_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    def build(draft: Draft) -> None:
        raise ArtifactError("bad input")

    with pytest.raises(ArtifactError):
        produce(tmp_path / "a", Kind.DATASET, stage="s", config=Config(out=tmp_path), inputs={}, build=build,
                resumable=True)
    assert list(tmp_path.iterdir()) == []


def test_a_resumable_stage_keeps_its_work_when_the_disk_is_full(tmp_path: Path) -> None:
    def build(draft: Draft) -> None:
        draft.write_text("work/checkpoint", "hours")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NoSpaceError):
        produce(tmp_path / "a", Kind.DATASET, stage="s", config=Config(out=tmp_path), inputs={}, build=build,
                resumable=True)
    assert (tmp_path / ".a.partial" / "work" / "checkpoint").read_text() == "hours"


def test_a_disk_that_is_full_from_the_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(NoSpaceError):
        make(tmp_path / "a", {"x": b"1"})
    assert list(tmp_path.iterdir()) == []


def test_the_current_folder_is_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="current folder"):
        make(Path(), {"x": b"1"})


def test_payload_is_readable_by_other_users(tmp_path: Path) -> None:
    artifact = produce(tmp_path / "a", Kind.DATASET, stage="s", config=Config(out=tmp_path), inputs={},
                       build=lambda d: d.write_tensors("x.safetensors", {"a": np.zeros(3)}))
    assert artifact.path("x.safetensors").stat().st_mode & 0o777 == 0o644


def follow(out: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """What a rank above 0 gets that has no part in the work of `make(out, ...)`."""
    monkeypatch.setenv("RANK", "1")
    return produce(out, Kind.DATASET, stage="test", config=Config(out=out), inputs={}, build=lambda draft: None)


def test_a_rank_that_has_nothing_to_do_waits_for_the_main_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"import pathlib, test_artifact as t; t.make(pathlib.Path({str(tmp_path / 'a')!r}), {{'x': b'1'}})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, env={**os.environ, "RANK": "0"}):
        # It follows long before the main process has even imported anything.
        assert follow(tmp_path / "a", monkeypatch).path("x").read_bytes() == b"1"


def test_a_rank_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_module, "HEADSTART_S", 0.2)
    with pytest.raises(ArtifactError, match="did not finish"):
        follow(tmp_path / "a", monkeypatch)

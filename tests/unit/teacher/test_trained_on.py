"""Nothing that is held out is trained on: by a run, or by the network that it goes on from."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fmdeploy.artifact import Artifact
from fmdeploy.config import StageConfig
from fmdeploy.data import trained_on
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.data.trained_on import check_training_data
from fmdeploy.data.writer import DatasetWriter
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError, DataError, LeakageError
from fmdeploy.evaluate.gates import Result
from fmdeploy.manifest import EVALUATED_ON, Kind, Parent
from fmdeploy.quantize.quantize import require_same_data
from fmdeploy.runtime.check.seen import seen_row
from fmdeploy.teacher.adapt.adapt import adapt
from fmdeploy.teacher.recalibrate import recalibrate
from fmdeploy.teacher.train import train
from support.training_data import TEACHER, write_scenes

FAST: dict[str, Any] = {"steps": 1, "batch": 4, "precision": "fp32"}
LEAK = "was trained on {} of the sequences that the run is judged on"
Stage = Callable[..., Artifact]


class _Renamed(StageConfig):
    """Configuration of a dataset whose sequences got other names."""

    splits: dict[str, tuple[str, ...]]


def _renamed(data: Dataset, out: Path, splits: dict[str, tuple[str, ...]]) -> Artifact:
    """Sequences of `data` in splits of their own, under other names and simulations; the arrays stay."""
    def build(draft: Draft) -> None:
        writer = DatasetWriter(draft)
        for sequence in data.sequences:
            if any(sequence.id in ids for ids in splits.values()):
                other = {**sequence.metadata, "simulation": f"x{sequence.group}", "seed": f"x{sequence.group}"}
                writer.add(f"x-{sequence.id}", data.arrays(sequence), other)
        writer.close({name: [f"x-{i}" for i in ids] for name, ids in splits.items()})

    return produce(out, Kind.DATASET, stage="data renamed", config=_Renamed(splits=splits), inputs={}, build=build)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`; teachers of its test scenes by name (`same`), of them under other names (`renamed`), of `other` scenes."""
    folder = tmp_path_factory.mktemp("trained-on")
    write_scenes(folder / "data")
    write_scenes(folder / "same", sequences=32)  # the first 16 are those of `data`, all of them for training
    data = open_dataset(folder / "data")
    _renamed(data, folder / "renamed", {"train": data.splits["test"], "test": data.splits["train"][:4]})
    write_scenes(folder / "other", seed=9)
    write_scenes(folder / "third", seed=5)  # that nothing was trained on
    for name in ("same", "renamed", "other"):
        train(data=folder / name, out=folder / f"{name}-teacher", steps=1, **TEACHER)
    return folder


def _train(home: Path, teacher: str, out: Path, **options: Any) -> Artifact:
    return train(data=home / "data", init=home / f"{teacher}-teacher", out=out, **FAST, **options)


def _adapt(home: Path, teacher: str, out: Path, **options: Any) -> Artifact:
    return adapt(data=home / "data", teacher=home / f"{teacher}-teacher", out=out, method="bias-norm", **FAST, **options)


def _recalibrate(home: Path, teacher: str, out: Path, **options: Any) -> Artifact:
    given = {"source_data": home / "third", **options}
    return recalibrate(data=home / "data", teacher=home / f"{teacher}-teacher", out=out, **given)


@pytest.mark.parametrize("stage", [_train, _adapt, _recalibrate])
@pytest.mark.parametrize(("teacher", "count"), [("same", 4), ("renamed", 2)])
def test_a_network_that_saw_the_held_out_scenes_is_refused(
    home: Path, tmp_path: Path, stage: Stage, teacher: str, count: int
) -> None:
    with pytest.raises(LeakageError, match=LEAK.format(count)) as caught:
        stage(home, teacher, tmp_path / "t", teacher_data=home / teacher)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(("stage", "option"), [
    (_train, "replay"), (_adapt, "replay"), (_adapt, "source_data"), (_recalibrate, "source_data")])
def test_a_dataset_that_is_given_anyway_counts_as_shown(home: Path, tmp_path: Path, stage: Stage, option: str) -> None:
    def given(name: str) -> dict[str, Any]:
        return {option: home / name if option == "source_data" else [home / name]}

    with pytest.raises(LeakageError, match=LEAK.format(2)):
        stage(home, "renamed", tmp_path / "t", **given("renamed"))
    made = stage(home, "other", tmp_path / "t", **given("other"))
    assert made.json("metrics.json")["teacher_data"] == {open_dataset(home / "other").digest: "disjoint"}


@pytest.mark.parametrize("stage", [_train, _adapt, _recalibrate])
def test_what_is_disjoint_passes_and_what_is_not_shown_is_said(
    home: Path, tmp_path: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = open_dataset(home / "other").digest
    for shown, state in (([], "not checked"), ([home / "other"], "disjoint")):
        made = stage(home, "other", tmp_path / state, teacher_data=shown)
        assert made.json("metrics.json")["teacher_data"] == {digest: state}
        said = f"trained on dataset {digest[:12]} too" in capsys.readouterr().err
        assert said == (state == "not checked")
    own = train(data=home / "data", out=tmp_path / "own", steps=1, **TEACHER)
    assert "teacher_data" not in own.json("metrics.json")


def test_a_dataset_that_nothing_was_trained_on_is_no_proof(home: Path, tmp_path: Path) -> None:
    message = "nothing that this run builds on was trained on this dataset"
    with pytest.raises(ConfigError, match=message):
        _adapt(home, "other", tmp_path / "a", teacher_data=home / "same")
    with pytest.raises(ConfigError, match=message):
        train(data=home / "data", out=tmp_path / "t", teacher_data=home / "other", steps=1, **TEACHER)
    with pytest.raises(ConfigError, match="is the dataset of this run"):
        _adapt(home, "other", tmp_path / "a", teacher_data=home / "data")


def test_a_dataset_without_training_scenes_was_only_looked_at(home: Path, tmp_path: Path) -> None:
    data = open_dataset(home / "data")
    looked_at = open_dataset(_renamed(data, tmp_path / "d", {"test": data.splits["test"]}).root)
    parent = Parent(kind=Kind.DATASET, stage="data renamed", digest=looked_at.digest)
    source: Any = SimpleNamespace(inputs={"replay0": parent})
    assert check_training_data([source], data, [tmp_path / "d"]) == {looked_at.digest: "disjoint"}


def test_a_dataset_that_a_network_was_only_evaluated_on_was_not_trained_on(home: Path) -> None:
    data = open_dataset(home / "data")
    parents = {name: Parent(kind=Kind.DATASET, stage="data scenes", digest=open_dataset(home / name).digest)
               for name in ("same", "other")}
    adapted = Parent(kind=Kind.ADAPTER, stage="teacher adapt", digest="1" * 64,
                     inputs={"data": parents["other"], EVALUATED_ON: parents["same"]})
    merged: Any = SimpleNamespace(inputs={"adapter": adapted, EVALUATED_ON: parents["same"]})
    assert check_training_data([merged], data, []) == {parents["other"].digest: "not checked"}
    with pytest.raises(ConfigError, match="nothing that this run builds on was trained on this dataset"):
        check_training_data([merged], data, [home / "same"])


def test_only_what_a_model_learnt_from_spoils_an_evaluation(home: Path) -> None:
    data, other = open_dataset(home / "same"), open_dataset(home / "other").artifact.parent()
    ids = [f"{data.splits['train'][0]}/3"]
    for role, result in (("replay0", Result.FAIL), (EVALUATED_ON, Result.PASS)):
        model: Any = SimpleNamespace(inputs={"data": other, role: data.artifact.parent()}, has=lambda _: False)
        assert seen_row(model, data, ids).result is result
        with pytest.raises(DataError, match="is not the dataset") if result is Result.PASS else nullcontext():
            require_same_data(model, data)


@pytest.mark.parametrize("role", ["replay", "judged"])
def test_what_another_dataset_holds_out_is_not_trained_on(home: Path, role: str) -> None:
    """`same` trains on all scenes of `data`, the held-out ones too; its own are of other simulations."""
    same, data = open_dataset(home / "same"), open_dataset(home / "data")
    message = r"same: the train split holds 4 of the sequences that \S+data holds out .*s012 of val"
    with pytest.raises(LeakageError, match=message):
        check_training_data([], same, [], **{role: [data]})
    if role == "replay":
        with pytest.raises(LeakageError, match=message):
            check_training_data([], data, [], replay=[same])
    else:  # what is only looked at trains nobody
        assert check_training_data([], data, [], judged=[same]) == {}


def test_every_recording_is_hashed_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_dataset(_pictures(tmp_path / "data", np.arange(24), 0))
    others = [open_dataset(_pictures(tmp_path / f"other{seed}", np.arange(24), seed)) for seed in (1, 2)]
    parents = {f"replay{k}": other.artifact.parent() for k, other in enumerate(others)}
    hashed = []
    plain = trained_on.content_digest

    def counting(dataset: Dataset, sequence: Any) -> str:
        hashed.append((dataset.digest, sequence.id))
        return plain(dataset, sequence)

    monkeypatch.setattr(trained_on, "content_digest", counting)
    source: Any = SimpleNamespace(inputs=parents)
    assert set(check_training_data([source], data, [], replay=others).values()) == {"disjoint"}
    assert len(hashed) == len(set(hashed)) == 3 * 24


PROCESS = """
import os, sys
from fmdeploy import cli
from fmdeploy.data import trained_on
plain = trained_on.content_digest
def telling(data, sequence):
    print("hashed by", os.environ["RANK"])
    return plain(data, sequence)
trained_on.content_digest = telling
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_of_two_processes_one_looks_and_tells_and_both_stop(home: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, "teacher", "train", "--data", str(home / "data"), "--init",
               str(home / "renamed-teacher"), "--teacher-data", str(home / "renamed"), "--out", str(tmp_path / "t")]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [subprocess.Popen(command, env={**common, "RANK": rank, "LOCAL_RANK": rank}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in "01"]
    (out, told), (silent, nothing) = (process.communicate() for process in started)
    assert [process.returncode for process in started] == [1, 1], told + nothing
    assert LEAK.format(2) in told
    assert told.count("fmdeploy: ") == 1
    assert "fmdeploy: " not in nothing
    assert set(out.split("\n")) == {"hashed by 0", ""}
    assert silent == ""
    assert not (tmp_path / "t").exists()


def _pictures(out: Path, rows: np.ndarray[Any, Any], seed: int) -> Path:
    """A set of arrays, whose groups have no names but their numbers."""
    rng = np.random.default_rng(seed)
    arrays = {"image": rng.random((24, 3, 32, 32), np.float32)[rows], "label": rng.integers(0, 10, 24)[rows]}
    return write_arrays(out, arrays, {"train": np.arange(12), "val": np.arange(12, 18), "test": np.arange(18, 24)}).root


def test_arrays_are_told_apart_by_their_bytes(tmp_path: Path) -> None:
    """Each set numbers its groups from 0: numbers that agree say nothing, bytes that agree do."""
    rows = np.arange(24)
    data = open_dataset(_pictures(tmp_path / "data", rows, 0))
    other, turned = _pictures(tmp_path / "other", rows, 1), _pictures(tmp_path / "turned", rows[::-1], 0)
    parents = {name: Parent(kind=Kind.DATASET, stage="data arrays", digest=open_dataset(name).digest) for name in (other, turned)}
    taken = _pictures(tmp_path / "taken", np.tile(np.arange(12, 24), 2), 0)  # trains on what `data` holds out
    tiled = _pictures(tmp_path / "tiled", np.tile(np.arange(12), 2), 0)  # holds out what `data` trains on
    assert check_training_data([], data, [], replay=[open_dataset(other)]) == {}
    for replayed, first in ((taken, "taken: "), (tiled, "data: ")):
        with pytest.raises(LeakageError, match=f"{first}the train split holds 12 of the sequences that"):
            check_training_data([], data, [], replay=[open_dataset(replayed)])
    unrelated: Any = SimpleNamespace(inputs={"data": parents[other]})
    assert set(check_training_data([unrelated], data, [other]).values()) == {"disjoint"}
    same: Any = SimpleNamespace(inputs={"data": parents[turned]})
    with pytest.raises(LeakageError, match=LEAK.format(12)):
        check_training_data([same], data, [turned])

"""What a teacher goes on from must not have been trained on what it is judged on: `teacher train --init`, `teacher adapt`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fmdeploy.artifact import Artifact
from fmdeploy.config import StageConfig
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.data.trained_on import check_training_data
from fmdeploy.data.writer import DatasetWriter
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError, LeakageError
from fmdeploy.manifest import Kind, Parent
from fmdeploy.teacher.adapt.adapt import adapt
from fmdeploy.teacher.train import train
from fmdeploy.training.mixture.options import open_replay
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
    for name in ("same", "renamed", "other"):
        train(data=folder / name, out=folder / f"{name}-teacher", steps=1, **TEACHER)
    return folder


def _train(home: Path, teacher: str, out: Path, **options: Any) -> Artifact:
    return train(data=home / "data", init=home / f"{teacher}-teacher", out=out, **FAST, **options)


def _adapt(home: Path, teacher: str, out: Path, **options: Any) -> Artifact:
    return adapt(data=home / "data", teacher=home / f"{teacher}-teacher", out=out, method="bias-norm", **FAST, **options)


@pytest.mark.parametrize("stage", [_train, _adapt])
@pytest.mark.parametrize(("teacher", "count"), [("same", 4), ("renamed", 2)])
def test_a_network_that_saw_the_held_out_scenes_is_refused(
    home: Path, tmp_path: Path, stage: Stage, teacher: str, count: int
) -> None:
    with pytest.raises(LeakageError, match=LEAK.format(count)) as caught:
        stage(home, teacher, tmp_path / "t", teacher_data=home / teacher)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(("stage", "option"), [(_train, "replay"), (_adapt, "replay"), (_adapt, "source_data")])
def test_a_dataset_that_is_given_anyway_counts_as_shown(home: Path, tmp_path: Path, stage: Stage, option: str) -> None:
    def given(name: str) -> dict[str, Any]:
        return {option: home / name if option == "source_data" else [home / name]}

    with pytest.raises(LeakageError, match=LEAK.format(2)):
        stage(home, "renamed", tmp_path / "t", **given("renamed"))
    made = stage(home, "other", tmp_path / "t", **given("other"))
    assert made.json("metrics.json")["teacher_data"] == {open_dataset(home / "other").digest: "disjoint"}


@pytest.mark.parametrize("stage", [_train, _adapt])
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
    source: Any = SimpleNamespace(inputs={"source_data": parent})
    assert check_training_data([source], data, [tmp_path / "d"]) == {looked_at.digest: "disjoint"}


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
    assert len(open_replay([other], data)) == 1
    with pytest.raises(LeakageError, match="holds 12 of the sequences that --data is judged on, byte for byte"):
        open_replay([turned], data)
    unrelated: Any = SimpleNamespace(inputs={"data": parents[other]})
    assert set(check_training_data([unrelated], data, [other]).values()) == {"disjoint"}
    same: Any = SimpleNamespace(inputs={"data": parents[turned]})
    with pytest.raises(LeakageError, match=LEAK.format(12)):
        check_training_data([same], data, [turned])

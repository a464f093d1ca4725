"""Traps of time, place and metadata: each is planted in a copy of clean data and found, with who is concerned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fmdeploy.artifact import Artifact
from fmdeploy.cli import group
from fmdeploy.config import OutputPath, StageConfig
from fmdeploy.data.audit import audit
from fmdeploy.data.format import Dataset, open_dataset, open_unchecked
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.data.split import split, tile_of
from fmdeploy.data.telling import telling_metadata
from fmdeploy.data.writer import DatasetWriter
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import DataError, LeakageError
from fmdeploy.manifest import Kind

Plant = Callable[..., Artifact]


def place_of(data: Dataset) -> dict[str, str]:
    return {sequence: name for name, ids in data.splits.items() for sequence in ids}


def test_one_route_on_one_day_is_found_and_does_not_open(recording: Dataset, plant: Plant) -> None:
    one, other = recording.splits["train"][0], recording.splits["test"][0]
    same = {"route": "A9 north", "date": "2026-03-05"}
    leaking = plant("route", edit=lambda s: same if s.id in (one, other) else {})
    found = audit(data=str(leaking.root), content=False)
    assert [(leak["trap"], set(leak["samples"])) for leak in found.data] == [("same route same day", {one, other})]
    with pytest.raises(LeakageError, match="A9 north on 2026-03-05"):
        open_dataset(leaking.root)
    another_day = plant("days", edit=lambda s: {**same, "date": f"2026-03-0{1 + (s.id == one)}"} if s.id in (one, other) else {})
    assert audit(data=str(another_day.root), content=False).data == []


def test_a_map_from_the_future_is_found(recording: Dataset, plant: Plant) -> None:
    victims = set(recording.splits["test"][:2])
    late = plant("map", edit=lambda s: {"map_date": "2026-09-01", "map_version": "v9"} if s.id in victims else {})
    found = audit(data=str(late.root), content=False).data
    assert [(leak["trap"], set(leak["samples"])) for leak in found] == [("future map", victims)]
    assert "map v9 of 2026-09-01" in found[0]["why"]
    same_day = plant("today", edit=lambda s: {"map_date": s.metadata["date"]})
    assert audit(data=str(same_day.root), content=False).data == []


@pytest.mark.parametrize(("source", "victims", "why"), [
    ({"model": "L", "trained_until": "2026-12-31"}, "test", "trained until 2026-12-31, not before the drives"),
    ({"model": "L", "trained_until": "2026-12-31"}, "train", "held-out drives begin on 2026-03"),
    ({"model": "L", "trained_on": ["@test"]}, "train", "which is held out"),
    ({"model": "L", "trained_until": "2025-12-31", "trained_on": ["@train"]}, "train", ""),
    ({"model": "L", "trained_until": "2025-12-31"}, "test", ""),
])
def test_labels_by_a_model_that_saw_the_future(
    recording: Dataset, plant: Plant, source: dict[str, object], victims: str, why: str
) -> None:
    members = {"@test": recording.splits["test"][0], "@train": recording.splits["train"][0]}
    filled = {**source, "trained_on": [members[name] for name in source.get("trained_on", ())]}  # type: ignore[attr-defined]
    chosen = set(recording.splits[victims])
    made = plant("labels", edit=lambda s: {"label_source": filled} if s.id in chosen else {})
    found = audit(data=str(made.root), content=False).data
    if not why:
        assert found == []
        return
    assert {leak["trap"] for leak in found} == {"labels from the future"}
    assert {name for leak in found for name in leak["samples"]} == chosen
    assert why in found[0]["why"]


def test_a_date_that_is_none_is_told(recording: Dataset, plant: Plant) -> None:
    made = plant("dates", edit=lambda s: {"date": "yesterday"})
    with pytest.raises(DataError, match="date is no date.*found 'yesterday'"):
        audit(data=str(made.root), content=False)


class ToyConfig(StageConfig):
    """Sequences with labels that chance decides."""

    out: OutputPath
    key: str


def toy(out: Path, key: str, tell: Callable[[bool, np.random.Generator], object]) -> Artifact:
    """160 short sequences; `rare_x` is true for half of them, and the metadata's `key` is what `tell` makes of it."""
    rng = np.random.default_rng(5)

    def members() -> Iterator[tuple[str, bool]]:
        for number in range(160):
            yield f"clip-{rng.integers(10**9):09d}", bool(rng.random() < 0.5 + 0.2 * (number % 2))

    def build(draft: Draft) -> None:
        writer, splits = DatasetWriter(draft), {"train": [], "val": [], "test": []}  # type: ignore[var-annotated]
        for number, (name, rare) in enumerate(members()):
            metadata: dict[str, object] = {"simulation": name, "weather": ("sun", "rain")[number % 2], "exposure_ms": float(rng.random())}
            if key != "id":
                metadata[key] = tell(rare, rng)
            name = f"{tell(rare, rng)}-{name}" if key == "id" else name
            writer.add(name, {"rare_x": np.full(3, rare), "value": rng.random((3, 2))}, metadata)
            splits[("train", "train", "val", "test")[number % 4]].append(name)
        writer.close(splits)

    return produce(out, Kind.DATASET, stage="test", config=ToyConfig(out=out, key=key), inputs={}, build=build)


TELLS: dict[str, tuple[str, Callable[[bool, np.random.Generator], object]]] = {
    "a path": ("path", lambda rare, rng: f"/data/{'events' if rare else 'plain'}/{rng.integers(10**6)}.bin"),
    "a name": ("id", lambda rare, rng: "evt" if rare else "reg"),
    "a number": ("gain_db", lambda rare, rng: float(rng.normal(3.0 if rare else 0.0))),
    "a length": ("bytes", lambda rare, rng: int(rng.integers(900, 1400) if rare else rng.integers(500, 1000))),
}


@pytest.mark.parametrize("tell", TELLS)
def test_metadata_that_predicts_a_label_is_named(tmp_path: Path, tell: str) -> None:
    key, function = TELLS[tell]
    found = audit(data=str(toy(tmp_path / "data", key, function).root))
    assert found.exit_code == 1
    assert {leak["trap"] for leak in found.data} == {"telling metadata"}
    assert all(f"'{key}' predicts the label 'rare_x'" in leak["why"] for leak in found.data)


def test_metadata_that_says_nothing_is_not(tmp_path: Path) -> None:
    made = toy(tmp_path / "data", "operator", lambda rare, rng: f"person {rng.integers(5)}")
    assert audit(data=str(made.root)).data == []
    probed = telling_metadata(open_unchecked(made.root))
    assert probed.labels == ("rare_x",)
    assert {"id", "operator", "exposure_ms", "simulation"} <= set(probed.keys)
    assert "weather" not in probed.keys  # context: half of the clips in rain are rare, and everybody may know


def test_context_that_is_declared_may_predict(tmp_path: Path) -> None:
    made = toy(tmp_path / "data", "district", lambda rare, rng: "docks" if rare else "hills")
    assert {leak["trap"] for leak in audit(data=str(made.root)).data} == {"telling metadata"}
    assert audit(data=str(made.root), context=["district", "weather"]).data == []


def test_the_command_line_prints_a_list(recording: Dataset, plant: Plant) -> None:
    clean = CliRunner().invoke(group, ["data", "audit", str(recording.artifact.root), "--json"])
    assert (clean.exit_code, json.loads(clean.stdout)) == (0, [])
    late = plant("late", edit=lambda s: {"map_date": "2027-01-01"})
    found = CliRunner().invoke(group, ["data", "audit", str(late.root), "--json"])
    assert found.exit_code == 1
    assert [set(leak) for leak in json.loads(found.stdout)] == [{"trap", "samples", "why"}] * 3  # one a split


def test_chronological_splits_test_on_the_last_days(recording: Dataset, tmp_path: Path) -> None:
    made = open_dataset(split(data=str(recording.artifact.root), out=str(tmp_path / "x"), by="date", chronological=True).root)
    days = {name: sorted({str(s.metadata["date"]) for s in made.split(name)}) for name in ("train", "val", "test")}
    assert days["train"][-1] < days["val"][0]
    assert days["val"][-1] < days["test"][0]


def test_tiles_keep_neighbours_together(recording: Dataset, plant: Plant, tmp_path: Path) -> None:
    """Drives 20 m apart share a tile of a kilometre, those 50 km apart do not."""
    numbers = {s.id: k for k, s in enumerate(recording.sequences)}
    towns = {name: 48.0 + 0.5 * (k // 2 % 4) for name, k in numbers.items()}
    made = plant("map", edit=lambda s: {"position": [towns[s.id] + 1e-4, 11.5 + 2e-4 * (numbers[s.id] % 2)]})
    data = open_dataset(split(data=str(made.root), out=str(tmp_path / "x"), by="geography", tile_m=1000).root)
    by_town: dict[float, set[str]] = {}
    for name, place in place_of(data).items():
        by_town.setdefault(towns[name], set()).add(place)
    assert all(len(places) == 1 for places in by_town.values())
    with pytest.raises(DataError, match="has no 'position'"):
        split(data=str(recording.artifact.root), out=str(tmp_path / "y"), by="geography")


@pytest.mark.parametrize("position", [None, [48.0], ["a", 1.0], [float("nan"), 1.0], [91.0, 0.0],
                                      "48.0", "48.0 x", "nan 1", "1 2 3", {"x": 1}, [[1], 2]])
def test_positions_that_are_none(position: object) -> None:
    with pytest.raises(DataError, match="has no 'position'"):
        tile_of(SequenceInfo("x", "shards/0.tar", 3, {"position": position}), 100.0)

"""Splitting anew: by seed, by hold-out, and never leaking."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fmdeploy.data.audit import audit
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.split import split
from fmdeploy.errors import ConfigError, DataError, LeakageError


def values(data: Dataset, name: str, key: str) -> set[str]:
    return {str(sequence.metadata[key]) for sequence in data.split(name)}


def test_split_by_seed_keeps_simulations_whole(recording: Dataset, tmp_path: Path) -> None:
    root = str(recording.artifact.root)
    made = split(data=root, out=str(tmp_path / "a"), seed=3)
    data = open_dataset(made.root)
    assert made.inputs["data"].digest == recording.digest
    assert sum(len(ids) for ids in data.splits.values()) == len(recording.sequences)
    assert not values(data, "train", "seed") & values(data, "test", "seed")
    assert audit(data=str(made.root)).exit_code == 0
    assert data.splits != recording.splits
    same = split(data=root, out=str(tmp_path / "b"), seed=3)
    other = split(data=root, out=str(tmp_path / "c"), seed=4)
    assert same.digest == made.digest != other.digest
    shard = "shards/00000.tar"
    assert os.stat(made.path(shard)).st_ino == os.stat(recording.artifact.path(shard)).st_ino
    assert data.arrays(data.sequences[0]).keys() == recording.arrays(recording.sequences[0]).keys()


@pytest.mark.parametrize("key", ["scenario", "date", "weather"])
def test_held_out_values_stand_in_one_split_only(recording: Dataset, tmp_path: Path, key: str) -> None:
    held = sorted({str(s.metadata[key]) for s in recording.sequences})[:2]
    made = split(data=str(recording.artifact.root), out=str(tmp_path / key), by=key,
                 val_values=held[:1], test_values=held[1:])
    data = open_dataset(made.root)
    assert values(data, "val", key) == {held[0]}
    assert values(data, "test", key) == {held[1]}
    assert not values(data, "train", key) & set(held)


def test_shares_of_scenarios(recording: Dataset, tmp_path: Path) -> None:
    data = open_dataset(split(data=str(recording.artifact.root), out=str(tmp_path / "x"), by="scenario",
                              val=0.25, test=0.25).root)
    parts = [values(data, name, "scenario") for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [4, 2, 2]
    assert len(set.union(*parts)) == 8


def test_a_split_that_leaks_is_refused(recording: Dataset, tmp_path: Path) -> None:
    one = recording.sequences[0].id  # its simulation has a second ego
    with pytest.raises(LeakageError, match=f"shared seed: {one} .* and {one[:-1]}1"):
        split(data=str(recording.artifact.root), out=str(tmp_path / "x"), by="sequence", test_values=[one])
    assert not (tmp_path / "x").exists()
    with pytest.raises(LeakageError, match="this split leaks"):
        split(data=str(recording.artifact.root), out=str(tmp_path / "x"), by="ego", val=0, test=0.5)


def test_what_is_not_there_is_named(recording: Dataset, tmp_path: Path) -> None:
    root, out = str(recording.artifact.root), str(tmp_path / "x")
    with pytest.raises(DataError, match="no sequence has scenario 'moon'.*highway"):
        split(data=root, out=out, by="scenario", test_values=["moon"])
    with pytest.raises(DataError, match="has no 'continent' in its metadata.*weather"):
        split(data=root, out=out, by="continent")
    with pytest.raises(DataError, match="'val' would be empty"):
        split(data=root, out=out, by="map_version")
    with pytest.raises(ConfigError, match="held out for both"):
        split(data=root, out=out, by="scenario", val_values=["merge"], test_values=["merge"])


def test_copies_where_links_are_impossible(recording: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    linked = split(data=str(recording.artifact.root), out=str(tmp_path / "linked"))
    monkeypatch.setattr(os, "link", refuse)
    copied = split(data=str(recording.artifact.root), out=str(tmp_path / "copied"))
    assert linked.digest == copied.digest

"""Recording the apron: the parking lot, slow and cluttered scenes, another sensor rig, scenes without a class."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fmdeploy.data.audit import audit
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.highway import SCENARIOS, new_driver, open_road
from fmdeploy.data.lot import AISLES, pave
from fmdeploy.data.record import RecordConfig, record
from fmdeploy.data.rigs import RIGS
from fmdeploy.data.scenes import SPEED, X, Y, simulate
from fmdeploy.errors import DataError
from fmdeploy.evaluate.evaluation import evaluate
from fmdeploy.task import Array, Arrays, load_task
from fmdeploy.tasks import bev_occupancy_samples
from fmdeploy.tasks.bev_occupancy_samples import BevSamples
from support.driving import drive


@pytest.fixture(scope="module")
def apron(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Six short simulations of the airside example."""
    out = tmp_path_factory.mktemp("apron") / "airside"
    record(out=out, simulations=6, frames=24, seed=1, scenarios=["parking", "intersection"], profile="airside", rig="bumper-1",
           weathers=["night", "fog"], val=0.2, test=0.2, workers=1)
    return open_dataset(out)


def cells(data: Dataset, number: int, plane: str) -> Array:
    """Bool (T, 64, 64)."""
    return np.unpackbits(data.arrays(data.sequences[number])[plane], axis=1).reshape(-1, 64, 64).astype(bool)


def test_the_lot_drives_exactly_like_highway_env() -> None:
    def driven(fast: bool) -> Array:
        with open_road("parking", 3) as (road, _):
            pave(road)
            out, back = AISLES
            places = ((out, 0, 40.0, 4.0), (out, 0, 52.0, 2.0), (out, 1, 45.0, 3.0), (back, 1, 50.0, 2.5))
            road.vehicles = [new_driver(road, (*nodes, rank), along, speed) for nodes, rank, along, speed in places]
            return drive(road, fast=fast, steps=60)

    stock, fast = driven(False), driven(True)
    assert np.abs(stock - fast).max() < 1e-9
    assert np.abs(stock[-1] - stock[0])[:, 0].min() > 3


@pytest.mark.parametrize("scenario", ["parking", "intersection", "highway"])
def test_airside_scenes_are_slow_and_cluttered(scenario: str) -> None:
    scene = simulate(scenario, 4, frames=25, profile="airside")  # type: ignore[arg-type]
    assert len(scene.egos) == 2
    speed_N = np.nanmax(scene.box_TN6[..., SPEED], axis=0)
    assert speed_N.max() < 4 * 1.5
    place_TN2 = scene.box_TN6[..., X : Y + 1]
    parked_N = (speed_N == 0) & (place_TN2[0] == place_TN2[-1]).all(axis=-1)
    assert parked_N.sum() >= 5
    assert not parked_N[list(scene.egos)].any()
    away_N = np.linalg.norm(place_TN2[-1] - place_TN2[0], axis=-1)
    assert (away_N[list(scene.egos)] > 1.5).all()
    ego = scene.egos[0]
    gap_TN = np.linalg.norm(place_TN2 - place_TN2[:, ego : ego + 1], axis=-1)
    assert (gap_TN < 32).sum(axis=1).mean() - 1 >= 6
    standing_M2 = place_TN2[0, parked_N]
    apart_MM = np.linalg.norm(standing_M2[:, None] - standing_M2, axis=-1) + np.eye(len(standing_M2)) * 99
    assert apart_MM.min() > 2.2, "nobody stands inside another"


def test_a_lot_is_a_lot_on_any_profile() -> None:
    scene = simulate("parking", 2, frames=10)
    assert {lane.index[:2] for lane in scene.lanes} == {("a", "b"), ("b", "c"), *AISLES}
    speed_TN = scene.box_TN6[..., SPEED]
    assert (speed_TN[0] == 0).sum() >= 10
    assert np.nanmax(speed_TN) < 6


def test_metadata_says_what_was_recorded(apron: Dataset) -> None:
    assert {s.metadata["sensor_rig"] for s in apron.sequences} == {"bumper-1"}
    assert {s.metadata["place"] for s in apron.sequences} == {"airside-parking", "airside-intersection"}
    version = {s.metadata["scenario"]: s.metadata["map_version"] for s in apron.sequences}
    assert version["parking"] == version["intersection"] + "+aisles"
    assert audit(data=apron.artifact.root).exit_code == 0


def test_usual_recordings_keep_their_request() -> None:
    usual = RecordConfig.model_validate({"out": "x"}).resolved()
    assert "profile" not in usual
    assert "rig" not in usual
    assert tuple(usual["scenarios"]) == SCENARIOS
    other = RecordConfig.model_validate({"out": "x", "rig": "bumper-1", "profile": "airside"}).resolved()
    assert (other["rig"], other["profile"]) == ("bumper-1", "airside")


def test_the_bumper_sees_less(apron: Dataset, tmp_path: Path) -> None:
    record(out=tmp_path / "roof", simulations=6, frames=24, seed=1, scenarios=["parking", "intersection"], profile="airside",
           weathers=["night", "fog"], val=0.2, test=0.2, workers=1)
    roof = open_dataset(tmp_path / "roof")
    assert roof.digest != apron.digest
    offset_G = 31.5 - np.arange(64)
    far_GG = np.hypot(offset_G[:, None], offset_G[None]) > RIGS["bumper-1"].lidar_m + 2
    behind_GG = np.broadcast_to(offset_G[:, None] < 0, (64, 64))
    hits = Counter[str]()
    for number, sequence in enumerate(apron.sequences):
        assert roof.sequences[number].id == sequence.id
        assert np.array_equal(cells(roof, number, "occupancy"), cells(apron, number, "occupancy"))
        hit, free, drivable = (cells(apron, number, name) for name in ("lidar_hit", "lidar_free", "camera_drivable"))
        assert not (hit | free)[:, far_GG].any()
        assert not drivable[:, behind_GG].any()
        hits["bumper"] += int(hit.sum())
        hits["roof"] += int(cells(roof, number, "lidar_hit").sum())
    assert 0 < hits["bumper"] < 0.7 * hits["roof"]


def test_scenes_of_no_class_are_left_out_of_the_class(apron: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = BevSamples.of(apron, "train")
    parking_N = np.asarray(samples.slices["scenario"]).astype(str) == "parking"
    assert 0 < parking_N.sum() < len(samples)
    assert (samples.scene_N[parking_N] == -1).all()
    assert (samples.scene_N[~parking_N] == SCENARIOS.index("intersection")).all()

    def predict(inputs: Arrays) -> Arrays:
        scene = np.full((len(inputs["lidar"]), 8), -5.0, np.float32)
        scene[:, SCENARIOS.index("intersection")] = 5.0
        return {"bev": np.zeros((len(scene), 5, 64, 64), np.float32), "scene": scene}

    task = load_task("bev-occupancy")
    found = evaluate(predict, samples, task.metrics(), data="x")
    accuracy = next(metric for metric in task.metrics() if metric.name == "scene_accuracy")
    assert found.value(accuracy) == 1.0, "parking counts neither way"

    monkeypatch.setattr(bev_occupancy_samples, "OFF_ROAD", ())
    with pytest.raises(DataError, match="unknown scenario"):
        BevSamples.of(apron, "train")

"""What a recording holds: every scenario, every weather, labels that are later frames."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fmdeploy.data.format import Dataset
from fmdeploy.data.highway import SCENARIOS
from fmdeploy.data.info import info
from fmdeploy.data.record import RecordConfig, assign, plan, record
from fmdeploy.data.sensors import PLANES
from fmdeploy.data.weather import WEATHERS
from fmdeploy.errors import ConfigError, DataError
from fmdeploy.task import Array
from fmdeploy.tasks.bev_occupancy_samples import HORIZONS, BevSamples


def cells(data: Dataset, number: int, plane: str) -> Array:
    """Bool (T, 64, 64)."""
    return np.unpackbits(data.arrays(data.sequences[number])[plane], axis=1).reshape(-1, 64, 64).astype(bool)


def test_every_sequence_is_whole(recording: Dataset) -> None:
    assert len(recording.sequences) == 32
    for sequence in recording.sequences:
        arrays = recording.arrays(sequence)
        assert {name: (a.dtype.name, a.shape) for name, a in arrays.items()} == {
            **dict.fromkeys(PLANES, ("uint8", (40, 512))), "ttc": ("float32", (40,)), "ego_motion": ("float32", (40, 3)),
            "rare_near_collision": ("bool", (40,)), "rare_cut_in": ("bool", (40,))}
        assert set(sequence.metadata) >= {
            "scenario", "seed", "ego", "weather", "sensor_rig", "map_version", "date", "simulation"}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_has_traffic_and_roads(recording: Dataset, scenario: str) -> None:
    numbers = [i for i, s in enumerate(recording.sequences) if s.metadata["scenario"] == scenario]
    occupancy, drivable, hit, free, seen, line = (
        np.mean([cells(recording, i, plane).mean() for i in numbers])
        for plane in ("occupancy", "drivable", "lidar_hit", "lidar_free", "camera_vehicle", "camera_line")
    )
    assert 0.003 < occupancy < 0.04
    assert 0.1 < drivable < 0.6
    assert 0.002 < hit < 0.03
    assert 0.1 < free < 0.95
    assert 0.0005 < seen < occupancy
    assert 0.003 < line < 0.1
    moved = [np.mean(cells(recording, i, "occupancy")[0] != cells(recording, i, "occupancy")[-1]) for i in numbers]
    assert min(moved) > 0.001


def test_every_weather_occurs_and_fog_is_the_worst(recording: Dataset) -> None:
    def overlap(weather: str) -> float:
        both = either = 0
        for i, sequence in enumerate(recording.sequences):
            if sequence.metadata["weather"] == weather:
                seen = cells(recording, i, "lidar_hit") | cells(recording, i, "camera_vehicle")
                truth = cells(recording, i, "occupancy")
                both, either = both + int((seen & truth).sum()), either + int((seen | truth).sum())
        return both / either

    iou = {weather: overlap(weather) for weather in WEATHERS}
    assert iou["fog"] < 0.3 < iou["rain"] < iou["clear"] < 0.7
    assert iou["fog"] < 0.3 < iou["night"] < iou["clear"]


def test_sensors_agree_with_the_truth_in_clear_weather(recording: Dataset) -> None:
    for i, sequence in enumerate(recording.sequences):
        if sequence.metadata["weather"] == "clear":
            hit, free, truth = (cells(recording, i, plane) for plane in ("lidar_hit", "lidar_free", "occupancy"))
            near = np.zeros_like(truth)
            for rows in (-1, 0, 1):
                for columns in (-1, 0, 1):
                    near |= np.roll(truth, (rows, columns), axis=(1, 2))
            assert (hit & near).sum() > 0.97 * hit.sum()
            assert (hit & truth).sum() > 0.4 * hit.sum()  # the others graze a box: their cell's centre lies outside
            assert (free & truth).sum() < 0.25 * truth.sum()
            assert not (hit & free).any()


def test_labels_are_later_frames(recording: Dataset) -> None:
    samples = BevSamples.of(recording, "train")
    assert len(samples) == 15 * len(recording.splits["train"])
    sequences = {sequence.id: i for i, sequence in enumerate(recording.sequences)}
    index = np.array([0, 7, 14, 15, len(samples) - 1])
    inputs, targets = samples.batch(index)
    assert {k: (v.dtype.name, v.shape) for k, v in {**inputs, **targets}.items()} == {
        "lidar": ("float32", (5, 8, 64, 64)), "camera": ("float32", (5, 12, 64, 64)),
        "bev": ("uint8", (5, 5, 64, 64)), "scene": ("int64", (5,))}
    for row, sample in enumerate(index):
        sequence, frame = samples.ids[sample].rsplit("/", 1)
        number, t = sequences[sequence], int(frame)
        for h, ahead in enumerate(HORIZONS):
            assert np.array_equal(targets["bev"][row, h], cells(recording, number, "occupancy")[t + ahead])
        assert np.array_equal(targets["bev"][row, 4], cells(recording, number, "drivable")[t])
        for back in range(4):
            frame_ = t - 3 + back
            assert np.array_equal(inputs["lidar"][row, 2 * back], cells(recording, number, "lidar_hit")[frame_])
            assert np.array_equal(inputs["lidar"][row, 2 * back + 1], cells(recording, number, "lidar_free")[frame_])
            assert np.array_equal(inputs["camera"][row, 3 * back + 2], cells(recording, number, "camera_line")[frame_])
        assert SCENARIOS[targets["scene"][row]] == recording.sequences[number].metadata["scenario"]


def test_batches_repeat_and_do_not_share_memory(recording: Dataset) -> None:
    samples = BevSamples.of(recording, "test")
    one, again = samples.batch(np.arange(4)), samples.batch(np.arange(4))
    one[0]["lidar"][:] = 5
    assert not np.shares_memory(one[0]["camera"], again[0]["camera"])
    assert again[0]["lidar"].max() == 1
    assert all(value.flags.c_contiguous for value in again[0].values())


def test_groups_are_simulations_and_slices_name_the_weather(recording: Dataset) -> None:
    samples = BevSamples.of(recording, "all")
    simulations = [samples.ids[i].rsplit("-", 1)[0] for i in range(len(samples))]
    assert len(set(samples.groups)) == len(set(simulations)) == 16
    assert len(set(zip(simulations, samples.groups.tolist(), strict=True))) == 16
    assert set(samples.slices) == {"scenario", "weather", "rare"}
    assert set(samples.slices["weather"]) == set(WEATHERS)
    assert set(samples.slices["rare"]) <= {"none", "near-collision", "cut-in"}


def test_samples_of_another_kind_of_dataset_are_refused(recording: Dataset, tmp_path: object) -> None:
    from fmdeploy.data.format import open_dataset
    from fmdeploy.data.from_arrays import write_arrays

    out = Path(str(tmp_path)) / "digits"
    write_arrays(out, {"image": np.zeros((6, 8, 8), np.float32)}, {"train": np.arange(6)})
    with pytest.raises(DataError, match="no usable plane 'lidar_hit'"):
        BevSamples.of(open_dataset(out), "train")


def test_splits_are_disjoint_in_simulations_and_seeds(recording: Dataset) -> None:
    seeds = {name: {s.metadata["seed"] for s in recording.split(name)} for name in ("train", "val", "test")}
    assert not (seeds["train"] & seeds["val"] | seeds["train"] & seeds["test"] | seeds["val"] & seeds["test"])
    assert sum(map(len, seeds.values())) == 16


def test_default_plan_is_60_20_20_in_every_scenario() -> None:
    config = RecordConfig.model_validate({"out": "x"})
    jobs = plan(config)
    splits = assign(config, jobs)
    assert len({job.seed for job in jobs}) == 240
    for scenario in SCENARIOS:
        here = [i for i, job in enumerate(jobs) if job.scenario == scenario]
        assert Counter(splits[i] for i in here) == {"train": 18, "val": 6, "test": 6}
        weathers = Counter((splits[i], jobs[i].weather) for i in here)
        assert len(weathers) == 12  # every weather in every split
    other = plan(config.model_copy(update={"seed": 1}))
    assert not {job.seed for job in jobs} & {job.seed for job in other}


@pytest.mark.parametrize("options", [
    {"val": 0.25, "test": 0.25}, {"val": 0.5, "test": 0}, {"val": 0.26, "test": 0.24}, {"val": 0.137, "test": 0.211},
    {"val": 0.25, "test": 0.25, "scenarios": ["merge"], "simulations": 8}, {"simulations": 48},
    {"val": 0.5, "test": 0, "weathers": ["clear", "fog"]},
])
def test_no_weather_is_tied_to_a_split(options: dict[str, object]) -> None:
    """Weather and split were dealt by one counter: at a quarter each, rain was never trained on."""
    config = RecordConfig.model_validate({"out": "x", **options})
    jobs = plan(config)
    splits = assign(config, jobs)
    shares = {"train": 1 - config.val - config.test, "val": config.val, "test": config.test}
    for here in ({"weather"}, {"weather", "scenario"}):
        counts = Counter((tuple(getattr(job, key) for key in sorted(here)), split)
                         for job, split in zip(jobs, splits, strict=True))
        for group in {group for group, _ in counts}:
            size = sum(counts[group, split] for split in shares)
            assert all(abs(counts[group, split] - share * size) <= 1.5 for split, share in shares.items()), group


@pytest.mark.parametrize(("simulations", "digest"), [(40, "7f0ff8cd51da"), (240, "29591e8aad92")])
def test_recordings_and_splits_of_the_demo_stay_what_they_are(simulations: int, digest: str) -> None:
    config = RecordConfig(out=Path("x"), simulations=simulations)
    jobs = plan(config)
    dealt = [(job.seed, job.scenario, job.weather, split) for job, split in zip(jobs, assign(config, jobs), strict=True)]
    assert hashlib.sha256(repr(dealt).encode()).hexdigest()[:12] == digest


def test_dealing_evenly_never_empties_a_split() -> None:
    config = RecordConfig(out=Path("x"), simulations=98, scenarios=SCENARIOS[:7], weathers=WEATHERS[:2], val=0.17, test=0.006)
    assert set(assign(config, plan(config))) == {"train", "val", "test"}


def test_too_few_simulations_and_impossible_shares_are_refused(tmp_path: object) -> None:
    with pytest.raises(ConfigError, match="too few: val would be empty"):
        record(out=str(tmp_path), simulations=1)
    with pytest.raises(ConfigError, match="must leave something to train on"):
        record(out=str(tmp_path), val=0.5, test=0.5)
    with pytest.raises(ConfigError, match="scenarios repeat"):
        record(out=str(tmp_path), scenarios=["merge", "merge"])
    with pytest.raises(ConfigError, match="weathers.0"):
        record(out=str(tmp_path), weathers=["snow"])


def test_info_counts_what_is_there(recording: Dataset) -> None:
    outcome = info(data=str(recording.artifact.root))
    assert outcome.data["digest"] == recording.digest
    assert (outcome.data["sequences"], outcome.data["simulations"], outcome.data["frames"]) == (32, 16, 1280)
    assert {k: v["sequences"] for k, v in outcome.data["by"]["scenario"].items()} == dict.fromkeys(SCENARIOS, 4)
    assert sum(v["frames"] for v in outcome.data["splits"].values()) == 1280
    occupied = np.mean([cells(recording, i, "occupancy").mean() for i in range(32)])
    assert outcome.data["balance"]["occupancy"] == pytest.approx(occupied, abs=1e-5)
    near = sum(int(recording.arrays(s)["rare_near_collision"].sum()) for s in recording.sequences)
    assert outcome.data["rare_frames"]["near_collision"] == near > 0
    assert any("weather fog" in line for line in outcome.lines)

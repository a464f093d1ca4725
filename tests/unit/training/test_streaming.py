"""A split that does not fit its budget: the same batches from a bounded amount of memory, in an order made for that."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.arrays import Array, Arrays
from fmdeploy.data import blocks
from fmdeploy.data.blocks import BlockRows, Blocks, Labels, Names
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.data.samples import ArraySamples
from fmdeploy.errors import DataError
from fmdeploy.task import load_task
from fmdeploy.tasks.bev_occupancy_samples import BevSamples
from fmdeploy.training.batches import SupervisedBatches
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.mixture.options import Mixture
from fmdeploy.training.sampler import UniformSampler, WindowedSampler, make_sampler, step_index
from support.training_data import write_scenes

PER_SHARD = 2
SEQUENCE_BYTES = 16 * 7 * 512  # 16 frames of seven planes
BUDGET = 4 * PER_SHARD * SEQUENCE_BYTES  # four shards of the twelve that the split has


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("streaming") / "data"
    write_scenes(folder, sequences=32, per_shard=PER_SHARD)
    return open_dataset(folder)


def _equal(ours: Arrays, theirs: Arrays) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_small_budget_gives_the_same_samples_and_holds_to_its_bound(scenes: Dataset) -> None:
    whole, streamed = BevSamples.of(scenes, "train"), BevSamples.of(scenes, "train", budget=BUDGET)
    assert whole.blocks.fit
    assert not streamed.blocks.fit
    assert len(whole.blocks.bytes_K) == 12
    rng, largest = np.random.default_rng(0), 0
    for _ in range(40):
        index = rng.integers(0, len(whole), 5)
        for ours, theirs in zip(streamed.batch(index), whole.batch(index), strict=True):
            assert _equal(ours, theirs)
        offsets = [-3, 0, 8]
        assert np.array_equal(streamed.frames(index, offsets), whole.frames(index, offsets))
        assert np.array_equal(streamed.occupancy(index, offsets), whole.occupancy(index, offsets))
        largest = max(largest, streamed.planes.kept_bytes)
    assert largest == BUDGET
    assert whole.planes.kept_bytes == sum(whole.blocks.bytes_K) == 3 * BUDGET
    assert tuple(streamed.ids) == tuple(whole.ids)
    assert streamed.ids[:2] == ("s000/3", "s000/5")


def test_batches_of_a_split_that_does_not_fit_are_those_of_one_in_memory(scenes: Dataset) -> None:
    """Same order, same bytes; an epoch reads every shard once although samples are drawn at random."""
    task, config = load_task("bev-occupancy"), TrainingConfig(steps=9, batch=8, seed=5)
    streamed, whole = BevSamples.of(scenes, "train", budget=BUDGET), BevSamples.of(scenes, "train")
    ours = SupervisedBatches(task, Mixture(streamed), config)
    assert isinstance(ours.sampler, WindowedSampler)
    theirs = SupervisedBatches(task, Mixture(whole), config)
    theirs.__dict__["sampler"] = ours.sampler
    loads: list[int] = []
    load = streamed.planes._load

    def counting(number: int) -> Arrays:
        loads.append(number)
        return load(number)

    streamed.planes._load = counting
    for step in range(len(whole) // config.batch):
        mine, full = ours(step, 0), theirs(step, 0)
        assert mine.keys() == full.keys()
        assert all(_equal(mine[kind], full[kind]) for kind in mine)
    assert sorted(loads) == list(range(12))


def test_a_split_that_fits_keeps_the_uniform_order(scenes: Dataset) -> None:
    samples = BevSamples.of(scenes, "train")
    sampler = make_sampler(samples, 8, 3)
    assert isinstance(sampler, UniformSampler)
    for step in (0, 4, 33):
        assert np.array_equal(sampler.index(step), step_index(len(samples), 8, seed=3, step=step))
    chosen = np.arange(0, len(samples), 3)
    labelled = make_sampler(samples, 4, 3, chosen)
    assert np.array_equal(labelled.index(7), chosen[step_index(len(chosen), 4, seed=3, step=7)])


def _blocks(sizes: Sequence[int], budget: int) -> Blocks:
    return Blocks(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes), np.array(sizes) * 10, budget)


def test_every_epoch_of_windows_shows_every_sample_once_and_stays_in_a_window() -> None:
    found = _blocks([7, 5, 9, 3, 8, 6, 4, 9], budget=360)  # half of it: windows of at most 18 samples
    sampler = WindowedSampler(found, batch=1, seed=2)
    shown = np.array([sampler.index(step)[0] for step in range(3 * 51)])
    for epoch in range(3):
        order = shown[epoch * 51 : (epoch + 1) * 51]
        assert sorted(order) == list(range(51))
        first = {block: np.flatnonzero(found.block_N[order] == block) for block in range(8)}
        for place in range(51):  # the blocks that have begun and not ended are never more than a window
            begun = [block for block, places in first.items() if places[0] <= place <= places[-1]]
            assert found.bytes_K[begun].sum() <= 180
    assert not np.array_equal(shown[:51], shown[51:102])


def test_windows_are_functions_of_seed_and_step_and_keep_to_the_chosen() -> None:
    found = _blocks([10] * 20, budget=600)
    one, other = WindowedSampler(found, 8, seed=1), WindowedSampler(found, 8, seed=1)
    assert np.array_equal(one.index(61), other.index(61)), "without having seen the steps before"
    assert not np.array_equal(one.index(61), WindowedSampler(found, 8, seed=2).index(61))
    chosen = np.arange(3, 200, 7)
    labelled = WindowedSampler(found, 4, seed=1, chosen=chosen)
    assert labelled.count == len(chosen)
    shown = np.concatenate([labelled.index(step) for step in range(len(chosen))])
    for epoch in range(4):
        assert sorted(shown[epoch * len(chosen) : (epoch + 1) * len(chosen)]) == list(chosen)


def test_two_threads_may_read_at_once(scenes: Dataset) -> None:
    whole, streamed = BevSamples.of(scenes, "train"), BevSamples.of(scenes, "train", budget=1)
    wrong: list[Array] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            index = rng.integers(0, len(whole), 3)
            if not _equal(streamed.batch(index)[0], whole.batch(index)[0]):
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert streamed.planes.kept_bytes == blocks.KEPT_BLOCKS * PER_SHARD * SEQUENCE_BYTES


def test_array_samples_stream_as_well(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: Arrays = {"x": rng.random((3000, 3, 4), np.float32), "label": rng.integers(0, 9, 3000),
                      "slice_colour": np.array(["red", "blue", "green"] * 1000)}
    write_arrays(tmp_path / "data", arrays, {"train": np.arange(3000)})
    data = open_dataset(tmp_path / "data")
    whole, streamed = ArraySamples.of(data, "train", ["x"]), ArraySamples.of(data, "train", ["x"], budget=1)
    assert whole.blocks is None
    assert isinstance(make_sampler(whole, 8, 0), UniformSampler)
    assert streamed.blocks is not None
    assert len(streamed.blocks.bytes_K) == 3
    index = rng.integers(0, 3000, 50)
    for ours, theirs in zip(streamed.batch(index), whole.batch(index), strict=True):
        assert _equal(ours, theirs)
    assert np.array_equal(whole.batch(index)[0]["x"], whole.inputs["x"][index])
    assert np.array_equal(streamed.slices["colour"], whole.slices["colour"])
    assert tuple(streamed.ids) == tuple(whole.ids)
    assert np.array_equal(replace(whole, inputs={"x": whole.inputs["x"] * 2}).inputs["x"], whole.inputs["x"] * 2)


def test_a_shard_without_a_plane_is_refused_before_training(tmp_path: Path) -> None:
    write_arrays(tmp_path / "data", {"x": np.zeros((4, 2), np.float32)}, {"train": np.arange(4)})
    with pytest.raises(DataError, match="has no array 'y'"):
        ArraySamples.of(open_dataset(tmp_path / "data"), "train", ["y"])


def test_the_block_that_was_used_last_goes_last() -> None:
    loads: list[int] = []

    def load(number: int) -> Arrays:
        loads.append(number)
        return {"a": np.full(2, number)}

    rows = BlockRows(np.arange(0, 12, 2), {"a": (np.dtype(np.int64), ())}, np.full(6, 16), load, budget=64)
    for row in (0, 2, 4, 6, 1, 8, 0, 3):
        assert rows.take("a", np.array([row]))[0] == row // 2
    assert loads == [0, 1, 2, 3, 4, 1]
    assert rows.take("a", np.zeros((0, 3), np.int64)).shape == (0, 3)


def test_kept_blocks_lie_in_pages_of_their_own_and_off_the_heap() -> None:
    def load(number: int) -> Arrays:
        return {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "none": np.zeros((2, 0), np.uint8)}

    layout: dict[str, Any] = {"a": (np.dtype(np.float16), (3,)), "none": (np.dtype(np.uint8), (0,))}
    rows = BlockRows(np.array([0]), layout, np.array([12]), load)
    assert rows.take("a", np.array([1])).tolist() == [[3, 4, 5]]
    assert rows.take("none", np.array([1, 0])).shape == (2, 0)
    kept = rows._kept[0]["a"]
    owner: object = kept
    while isinstance(owner, np.ndarray):
        owner = owner.base
    assert isinstance(owner, (mmap.mmap, memoryview))
    assert rows.kept_bytes == 12


def test_names_and_labels_are_those_of_plain_ones() -> None:
    names = Names(["a", "b"], np.array([0, 0, 1]), np.array([3, 5, 3]))
    assert names == ("a/3", "a/5", "b/3")
    assert list(names) == [names[0], names[1], names[-1]]
    assert names[1:] == ("a/5", "b/3")
    assert "b/3" in names
    plain = {"weather": np.array(["fog", "clear", "fog"])}
    labels = Labels.of(plain)
    assert dict(labels).keys() == plain.keys()
    assert labels["weather"].dtype == plain["weather"].dtype
    assert labels["weather"].tolist() == plain["weather"].tolist()

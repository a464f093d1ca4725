"""Moving maps: exact on cells, bilinear between them, alike for arrays and tensors and at every resolution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fmdeploy.distill.augment import Augmentation, mine
from fmdeploy.distill.resolution import reduced
from fmdeploy.errors import ConfigError
from fmdeploy.task import Geometry, load_task
from fmdeploy.training.geometry import moved, shifted

TASK = load_task("bev-occupancy")
EVERYTHING = Augmentation.of(("flip", "translate", "crop"), TASK.io, {})


def _still(count: int) -> Any:
    return np.zeros(count, bool)


def test_a_shift_by_whole_cells_copies_them_and_repeats_the_border() -> None:
    value = np.random.default_rng(0).normal(size=(1, 2, 8, 8)).astype(np.float32)
    found = moved(value, Geometry(_still(1), shifted(np.array([2 / 8]), np.array([-1 / 8]))))
    assert np.array_equal(found[:, :, 2:, :-1], value[:, :, :-2, 1:])
    assert np.array_equal(found[:, :, 0, :-1], value[:, :, 0, 1:])
    assert np.array_equal(found[:, :, 2:, -1], value[:, :, :-2, -1])


def test_a_shift_by_half_a_cell_is_the_mean_of_two() -> None:
    value = np.random.default_rng(0).normal(size=(1, 1, 4, 4)).astype(np.float32)
    found = moved(value, Geometry(_still(1), shifted(np.array([0.5 / 4]), np.array([0.0]))))
    np.testing.assert_allclose(found[:, :, 1:], (value[:, :, 1:] + value[:, :, :-1]) / 2, rtol=1e-5, atol=1e-6)


def test_features_move_as_far_as_the_inputs_that_they_describe() -> None:
    inputs = np.random.default_rng(0).integers(0, 2, (3, 4, 64, 64)).astype(np.float32)
    features = inputs.reshape(3, 4, 8, 8, 8, 8).mean((3, 5))  # each token is the mean of its 8 x 8 cells
    geometry = Geometry(np.array([True, False, True]), shifted(np.array([8, -16, 0]) / 64, np.array([0, 8, -24]) / 64))
    wanted = moved(inputs, geometry).reshape(3, 4, 8, 8, 8, 8).mean((3, 5))
    inside = np.s_[:, :, 2:-2, 3:-3]  # at the border the inputs repeat cells, the features tokens
    np.testing.assert_allclose(moved(features, geometry)[inside], wanted[inside], atol=1e-6)


def test_arrays_and_tensors_are_moved_alike() -> None:
    geometry = EVERYTHING.draw(4, seed=0, step=3)
    value = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    box: Any = torch.from_numpy(geometry.box_B4)
    tensors = moved(torch.from_numpy(value), Geometry(torch.from_numpy(geometry.flip), box))
    assert np.array_equal(moved(value, geometry), tensors.numpy())
    half = moved(value.astype(np.float16), geometry)
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, moved(value, geometry), atol=5e-3)


def test_labels_stay_whole_numbers_and_the_input_is_not_touched() -> None:
    labels = np.random.default_rng(0).integers(0, 2, (4, 5, 64, 64)).astype(np.uint8)
    before = labels.copy()
    found = moved(labels, EVERYTHING.draw(4, seed=1, step=0))
    assert found.dtype == np.uint8
    assert set(np.unique(found)) <= {0, 1}
    assert np.array_equal(labels, before)


def test_a_crop_shows_the_part_that_it_names() -> None:
    value = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    found = moved(value, Geometry(_still(1), np.array([[0.0, 0.5, 0.5, 0.5]])))
    columns, rows = np.array([1.75, 2.25, 2.75, 3.0]), np.array([0.0, 0.25, 0.75, 1.25])  # clamped to the border
    np.testing.assert_allclose(found[0, 0], 4 * rows[:, None] + columns, atol=1e-5)


def test_the_draw_is_keyed_by_seed_step_and_place() -> None:
    first, again, other = (EVERYTHING.draw(8, seed=0, step=step) for step in (5, 5, 6))
    assert first.box_B4 is not None
    assert again.box_B4 is not None
    assert other.box_B4 is not None
    assert np.array_equal(first.box_B4, again.box_B4)
    assert not np.array_equal(first.box_B4, other.box_B4)
    shares = [mine(first, 4, part, 2) for part in (0, 1)]
    assert [len(share.flip) for share in shares] == [4, 4]
    boxes = np.concatenate([share.box_B4 for share in shares if share.box_B4 is not None])
    assert np.array_equal(boxes, first.box_B4[[0, 1, 4, 5, 2, 3, 6, 7]])


def test_shifts_can_be_kept_to_the_stride_of_the_features() -> None:
    exact = Augmentation.of(("translate",), TASK.io, {"translate": {"cells": 16, "step": 8}})
    geometry = exact.draw(256, seed=0, step=0)
    assert geometry.box_B4 is not None
    cells = geometry.box_B4[:, :2] * 64
    assert set(np.unique(cells)) == {-16.0, -8.0, 0.0, 8.0, 16.0}
    features = np.random.default_rng(0).normal(size=(256, 2, 8, 8)).astype(np.float32)
    assert np.isin(moved(features, geometry), features).all()


def test_unknown_options_and_tasks_without_maps_are_refused() -> None:
    with pytest.raises(ConfigError, match="augmentation crop: unknown key"):
        Augmentation.of(("crop",), TASK.io, {"crop": {"small": 1}})


def test_reduction_pools_inputs_labels_and_answers_consistently() -> None:
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {"bev": rng.normal(size=(2, 5, 64, 64)).astype(np.float32), "scene": rng.normal(size=(2, 8)),
                              "feature.tokens": rng.normal(size=(2, 6, 8, 8)).astype(np.float16)}
    small = reduced(values, 2, mean=False)
    windows = values["bev"].reshape(2, 5, 32, 2, 32, 2)
    assert np.array_equal(small["bev"], windows.max((3, 5)))
    assert small["scene"] is values["scene"]
    np.testing.assert_allclose(small["feature.tokens"], values["feature.tokens"].reshape(2, 6, 4, 2, 4, 2).mean((3, 5)),
                               atol=2e-3)
    labels = (values["bev"] > 1).astype(np.uint8)
    assert np.array_equal(reduced({"bev": labels}, 2, mean=False)["bev"], (small["bev"] > 1).astype(np.uint8))
    np.testing.assert_allclose(reduced({"lidar": values["bev"]}, 2, mean=True)["lidar"], windows.mean((3, 5)), atol=1e-6)
    tensors = reduced({k: torch.from_numpy(v) for k, v in values.items()}, 2, mean=False)
    assert np.array_equal(tensors["bev"].numpy(), small["bev"])

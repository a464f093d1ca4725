"""The demo task: mirror, losses, pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fmdeploy.tasks.bev_occupancy import BevOccupancy
from fmdeploy.tasks.image_classification import ImageClassification

BEV = BevOccupancy()


def _values(batch: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"lidar": rng.random((batch, 8, 64, 64), np.float32), "bev": rng.integers(0, 2, (batch, 5, 64, 64), np.uint8),
            "scene": rng.integers(0, 8, batch), "feature.tokens": rng.random((batch, 16, 8, 8)).astype(np.float16)}


def test_mirroring_reverses_left_and_right_of_every_map_and_nothing_else() -> None:
    values, mask = _values(), np.array([True, False, True])
    found = BEV.flip(values, mask)
    assert np.array_equal(found["lidar"][0], values["lidar"][0, :, :, ::-1])
    assert np.array_equal(found["feature.tokens"][2], values["feature.tokens"][2, :, :, ::-1])
    assert np.array_equal(found["bev"][1], values["bev"][1])
    assert np.array_equal(found["scene"], values["scene"])
    again = BEV.flip(found, mask)
    assert all(np.array_equal(again[name], values[name]) for name in values)


def test_mirroring_tensors_equals_mirroring_arrays() -> None:
    values, mask = _values(), np.array([True, False, True])
    tensors = BEV.flip({name: torch.from_numpy(value) for name, value in values.items()}, torch.from_numpy(mask))
    arrays = BEV.flip(values, mask)
    assert all(np.array_equal(tensors[name].numpy(), arrays[name]) for name in values)


def test_the_hard_loss_is_small_for_the_truth_and_large_for_its_opposite() -> None:
    targets = {"bev": torch.from_numpy(_values()["bev"]), "scene": torch.tensor([0, 3, 7])}
    truth = {"bev": 40.0 * (targets["bev"].float() - 0.5), "scene": 40 * torch.eye(8)[targets["scene"]]}
    opposite = {name: -value for name, value in truth.items()}
    assert BEV.loss(truth, targets).item() < 1e-3
    assert BEV.loss(opposite, targets).item() > 5


def test_the_primary_metric_is_the_mean_occupancy_iou() -> None:
    names = [metric.name for metric in BEV.metrics()]
    assert names[0] == "iou"
    assert len(set(names)) == len(names)
    assert BEV.metrics()[0].higher_is_better


def test_the_io_names_every_channel() -> None:
    assert BEV.io.inputs[0].channels[:2] == ("hit-0.6s", "free-0.6s")
    assert BEV.io.inputs[1].channels[-3:] == ("vehicle", "drivable", "line")
    assert BEV.io.outputs[0].channels == ("t", "+0.4s", "+0.8s", "+1.6s", "drivable")


@pytest.mark.parametrize("names", [("lidar", "camera"), ("bev",)])
def test_pictures_show_labels_and_logits_alike(names: tuple[str, ...]) -> None:
    values = _values(1) | {"camera": np.zeros((1, 12, 64, 64), np.float32)}
    picture = BEV.panel({name: values[name][0] for name in names})
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    if names == ("bev",):
        logits = (values["bev"][0].astype(np.float32) - 0.5) * 60
        assert np.abs(BEV.panel({"bev": logits}).astype(int) - picture).max() <= 1


def test_classification_distils_at_temperature_two() -> None:
    task, row = ImageClassification(), torch.randn(4, 10)
    assert task.distillation_loss({"logits": row}, {"logits": row}).item() == 0.0
    assert task.loss({"logits": 50 * torch.eye(10)[:4]}, {"label": torch.arange(4)}).item() < 1e-6

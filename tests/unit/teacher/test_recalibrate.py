"""`teacher recalibrate`: normalisation follows a sensor change, without labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fmdeploy.arrays import Array
from fmdeploy.artifact import open_artifact
from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.errors import ConfigError
from fmdeploy.models.saved import load_model
from fmdeploy.teacher.recalibrate import estimate_running, match_moments, norms_of, recalibrate
from fmdeploy.teacher.train import train

GAIN, OFFSET = np.full(3, 0.35, np.float32), np.full(3, 0.5, np.float32)  # a sensor of low contrast
SPLITS = {"train": np.arange(192), "test": np.arange(192, 288)}


def images(seed: int, *, other_sensor: bool) -> tuple[Array, Array]:
    """Classes are coarse patterns of three channels under noise; the other sensor has other gains and offsets."""
    label_N = np.random.default_rng(seed).integers(0, 10, 288)
    pattern_K3HW = np.random.default_rng(99).random((10, 3, 2, 2)).repeat(16, axis=2).repeat(16, axis=3)
    image = 0.7 * pattern_K3HW[label_N] + 0.3 * np.random.default_rng(seed + 1).random((288, 3, 32, 32))
    if other_sensor:
        image = image * GAIN[:, None, None] + OFFSET[:, None, None]
    return image.astype(np.float32), label_N


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recalibrate")
    for name, seed, other in (("old", 0, False), ("new", 7, True), ("same", 7, False)):
        image, label = images(seed, other_sensor=other)
        write_arrays(folder / name, {"image": image, "label": label}, SPLITS)
    train(data=folder / "old", out=folder / "teacher", task="image-classification", dim=16, depth=1, heads=2, steps=70, seed=1,
          batch=16, precision="fp32", lr=6e-3)
    return folder


def test_it_helps_after_a_planted_change_of_gains(home: Path, tmp_path: Path) -> None:
    found = recalibrate(teacher=home / "teacher", data=home / "new", source_data=home / "old", out=tmp_path / "t")
    target = found.json("metrics.json")["target"]
    assert target["after"] >= target["before"] + 0.3, target
    assert target["after"] == pytest.approx(found.json("metrics.json")["test"]["accuracy"])
    assert set(found.inputs) == {"teacher", "data", "source_data"}
    assert list(load_model(found).module.state_dict()) == list(load_model(open_artifact(home / "teacher")).module.state_dict())


def test_the_same_sensor_changes_next_to_nothing(home: Path, tmp_path: Path) -> None:
    found = recalibrate(teacher=home / "teacher", data=home / "same", source_data=home / "old", out=tmp_path / "t")
    target = found.json("metrics.json")["target"]
    assert abs(target["after"] - target["before"]) <= 0.05


def test_moments_are_equal_afterwards_in_every_layer(home: Path) -> None:
    network = load_model(open_artifact(home / "teacher")).module
    old, new = (torch.from_numpy(images(seed, other_sensor=other)[0]) for seed, other in ((0, False), (7, True)))

    def moments(x: torch.Tensor) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        handles = [norm.register_forward_hook(lambda m, i, o: seen.append(torch.stack((o.mean((0, 2, 3)), o.std((0, 2, 3), correction=0)))))
                   for norm in norms_of(network)[1] if isinstance(norm, nn.GroupNorm)]
        with torch.no_grad():
            network(x)
        for handle in handles:
            handle.remove()
        return seen

    wanted, before = moments(old), moments(new)
    match_moments(network, [old], [new])
    after = moments(new)
    assert max(float((a - w).abs().max()) for a, w in zip(before, wanted, strict=True)) > 0.2
    assert max(float((a - w).abs().max()) for a, w in zip(after, wanted, strict=True)) < 1e-3


def test_batch_norm_takes_the_statistics_of_the_new_data() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)).eval()
    x = torch.randn(64, 3, 8, 8) * 3 + 2
    momentum = network[1].momentum
    estimate_running(network, [x])
    with torch.no_grad():
        inner = network[0](x)
        out = network(x)
    assert torch.allclose(network[1].running_mean, inner.mean((0, 2, 3)), atol=1e-4)  # type: ignore[arg-type]
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(2), atol=1e-3)
    assert torch.allclose(out.std((0, 2, 3)), torch.ones(2), atol=1e-2)
    assert network[1].momentum == momentum
    assert not network[1].training


def test_layers_without_statistics_need_the_old_sensor(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep no statistics.*--source-data"):
        recalibrate(teacher=home / "teacher", data=home / "new", out=tmp_path / "t")

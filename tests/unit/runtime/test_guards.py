"""How the guards look at frames: views made once, probes, looks in turn, sensor modes in budgets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fmdeploy.budgets import Budgets, SensorLoss, read_budgets
from fmdeploy.errors import ArtifactError, ConfigError
from fmdeploy.iospec import TensorSpec
from fmdeploy.runtime import GuardConfig
from fmdeploy.runtime.bundle import InputStatistics, OutputStatistics
from fmdeploy.runtime.guards.content import Guards
from fmdeploy.runtime.guards.plausible import OutputGuard
from fmdeploy.runtime.guards.stream import is_constant
from fmdeploy.runtime.guards.views import PART_BYTES, Plan
from support.bundles import budgets, io_spec
from support.guards import guards_of
from support.runtimes import frame


def plan(shape: tuple[int, ...], std: tuple[float, ...] | None = None) -> Plan:
    channels = shape[0] if len(shape) > 1 else 1
    return Plan(TensorSpec(name="x", shape=shape), std or (1.0,) * channels)


@pytest.mark.parametrize("shape", [(1,), (5,), (7, 3), (1, 4, 4), (3, 2, 5), (8, 64, 64), (3, 224, 224), (64, 64, 3),
                                   (2, 3, 4, 5), (12, 1, 640)])
def test_every_shape_has_a_probe_and_looks(shape: tuple[int, ...]) -> None:
    found = plan(shape)
    array = np.zeros(shape, np.float32)
    assert 0 < len(array[found.probe].tobytes()) == found.probe_bytes
    ends = [group.stop for group in found.groups]
    assert [group.start for group in found.groups] == [0, *ends[:-1]], "groups cover all channels, once"
    assert ends[-1] == found.channels
    assert all((g.stop - g.start == 1) or (g.stop - g.start) * found.cells * 4 <= 1.5 * PART_BYTES for g in found.groups)
    spec = io_spec().model_copy(update={"inputs": (found.spec,)})
    known = InputStatistics(channel_mean=(0.5,) * found.channels, channel_std=(0.3,) * found.channels,
                            energy_mean=(0.3,) * found.channels, energy_std=(0.3,) * found.channels)
    guards = Guards(spec, {"x": known}, GuardConfig())
    rng = np.random.default_rng(0)
    for _ in range(30):
        assert guards.before({"x": rng.random(shape, np.float32)}).findings == []


def test_the_probe_takes_the_liveliest_channel_of_each_half() -> None:
    found = plan((6, 16, 16), (0.1, 0.9, 0.2, 0.3, 0.1, 0.8))
    picture = np.arange(6, dtype=np.float32)[:, None, None] * np.ones((6, 16, 16), np.float32)
    assert sorted(set(picture[found.probe].reshape(-1))) == [1, 5]


def test_views_are_made_once_for_the_same_array() -> None:
    guards, one, other = guards_of(), frame(0), frame(1)
    lidar = guards.inputs[0]
    first = lidar.views(one["lidar"])
    assert lidar.views(one["lidar"]) is first
    assert lidar.views(other["lidar"]) is not first
    one["lidar"][:] = np.nan
    assert guards.before(one).feeds is None, "the array is what is kept, never its content"


def test_always_copy_keeps_the_checked_bytes() -> None:
    guards, given = guards_of(config=GuardConfig(always_copy=True)), frame()
    feeds = guards.before(given).feeds
    assert feeds is not None
    expected = given["lidar"].copy()
    given["lidar"][:] = np.nan  # another thread writes after the check
    assert np.array_equal(feeds["lidar"][0], expected)


def test_scores_are_distances_in_standard_deviations() -> None:
    guards = guards_of()
    scores = guards.before(frame()).scores
    assert scores.keys() == {"lidar.distance", "camera.distance"}
    assert all(0 < score < 8 for score in scores.values())
    dark = frame()
    dark["lidar"] *= 0.1
    assert guards.before(dark).scores["lidar.distance"] > 8
    assert guards.before(dark).scores["camera.distance"] == scores["camera.distance"]


def test_statistics_of_another_model_are_refused() -> None:
    statistics = {"lidar": InputStatistics(channel_mean=(0.2,), channel_std=(0.1,)),
                  "camera": InputStatistics(channel_mean=(0.2,) * 12, channel_std=(0.1,) * 12)}
    with pytest.raises(ArtifactError, match=r"'lidar': the calibration statistics do not fit .*8 channels, found 1"):
        Guards(io_spec(), statistics, GuardConfig())
    short = statistics["lidar"].model_copy(update={"channel_std": (0.1,) * 8})
    with pytest.raises(ArtifactError, match="do not fit"):
        Guards(io_spec(), {**statistics, "lidar": short}, GuardConfig())


def test_constant() -> None:
    picture = np.zeros((3, 4, 4), np.float32)
    picture[1] = 2
    assert is_constant(picture, 3)
    picture[2, 3, 3] = 1
    assert not is_constant(picture, 3)


def test_output_band_reaches_to_what_was_seen_and_to_sigma() -> None:
    spec = TensorSpec(name="y", shape=(4,))
    known = OutputStatistics(rms_mean=10, rms_std=1, rms_min=5, rms_max=30)
    guard = OutputGuard(spec, known, sigma=8)
    for value, fine in ((10, True), (29, True), (31, False), (2.1, True), (1.9, False), (np.inf, False)):
        found: list[object] = []
        guard.check(np.full(4, value, np.float32), found)  # type: ignore[arg-type]
        assert (not found) is fine, value
    silent: list[object] = []
    OutputGuard(spec, None, 8).check(np.full(4, 3e38, np.float32), silent)  # type: ignore[arg-type]
    assert silent == [], "a sum of squares that overflows is no infinity"


def test_budgets_hold_sensor_modes(tmp_path: Path) -> None:
    limits = budgets().model_copy(update={"sensor_loss": {"front camera": SensorLoss(fill="zeros", max_drop=0.25)}})
    path = tmp_path / "budgets.toml"
    path.write_text(limits.to_toml())
    assert read_budgets(path) == limits
    path.write_text(limits.to_toml().replace('"zeros"', '"noise"'))
    with pytest.raises(ConfigError, match="fill"):
        read_budgets(path)
    assert Budgets.model_validate(budgets().model_dump()).sensor_loss == {}

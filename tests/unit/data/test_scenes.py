"""Scenes from highway-env: its quirks stay in one place, its trajectories stay its own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fmdeploy.data import highway
from fmdeploy.data.highway import SCENARIOS, Scenario, load, open_road
from fmdeploy.data.scenes import LENGTH, SPEED, WIDTH, Scene, simulate
from fmdeploy.task import Array
from support.driving import drive


def trajectories(scenario: Scenario, seed: int, *, fast: bool, steps: int = 30) -> Array:
    """(steps, N, 4): x, y, heading and speed of all vehicles of a stock scene."""
    with open_road(scenario, seed) as (road, _):
        return drive(road, fast=fast, steps=steps)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_fast_traffic_drives_exactly_like_highway_env(scenario: Scenario) -> None:
    for seed in (1, 2):
        stock, fast = (trajectories(scenario, seed, fast=fast) for fast in (False, True))
        assert np.abs(stock - fast).max() < 1e-9
        assert np.abs(stock[-1] - stock[0])[:, :2].max() > 5


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenes_are_busy_and_egos_stay_on_the_road(scenario: Scenario) -> None:
    scene = simulate(scenario, 5, frames=15)
    assert len(scene.egos) == 2
    ego = scene.box_TN6[:, scene.egos[0]]
    assert np.isfinite(ego).all()
    near = np.hypot(*(scene.box_TN6[..., :2] - ego[:, None, :2]).transpose(2, 0, 1)) < 32
    assert near.sum(axis=1).mean() - 1 >= 2
    assert np.nanmax(scene.box_TN6[..., SPEED]) < 41
    assert np.nanmin(scene.box_TN6[..., WIDTH]) >= 1.75
    assert np.nanmax(scene.box_TN6[..., LENGTH]) <= 8
    steps = np.hypot(*np.diff(ego[:, :2], axis=0).T)
    assert steps.max() < 41 * 0.2 + 0.5  # no jumps


def equal(one: Scene, other: Scene) -> bool:
    return one.egos == other.egos and np.array_equal(one.box_TN6, other.box_TN6, equal_nan=True)


def test_a_scene_depends_on_its_seed_alone() -> None:
    alone = simulate("highway", 3, frames=8)
    simulate("intersection", 3, frames=4)  # changes the driver model's constants while it runs
    assert equal(alone, simulate("highway", 3, frames=8))
    assert not equal(alone, simulate("highway", 4, frames=8))


def test_the_intersection_still_changes_every_driver() -> None:
    """When this fails, highway-env no longer sets class constants and the adapter need not restore them."""
    idm = load("highway_env.vehicle.behavior").IDMVehicle
    before = idm.DISTANCE_WANTED, idm.COMFORT_ACC_MAX
    with open_road("intersection", 0):
        assert (idm.DISTANCE_WANTED, idm.COMFORT_ACC_MAX) == (7, 6)
    assert (idm.DISTANCE_WANTED, idm.COMFORT_ACC_MAX) == before == (10, 3)


def test_the_racetrack_ego_is_still_not_a_driver() -> None:
    """When this fails, `IDMVehicle.create_from` works everywhere and `as_driver` can go."""
    environment = highway._environment("racetrack")
    environment.reset(seed=0)
    with pytest.raises(AttributeError, match="target_lane_index"):
        load("highway_env.vehicle.behavior").IDMVehicle.create_from(environment.vehicle)


def test_importing_highway_env_is_silent_and_late() -> None:
    code = (
        "import sys; import fmdeploy.data.record, fmdeploy.data.audit, fmdeploy.data.split, fmdeploy.data.info;"
        "heavy = {'highway_env', 'gymnasium', 'pygame', 'torch', 'matplotlib'} & set(sys.modules); assert not heavy, heavy;"
        "from fmdeploy.data.scenes import simulate; simulate('racetrack', 0, frames=2);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_highway_env_is_the_version_that_was_studied() -> None:
    assert highway.version() == "1.12.1"

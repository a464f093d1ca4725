"""Rare cases, on scenes made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fmdeploy.data.labels import cut_ins, rare_cases, time_to_collision
from fmdeploy.data.scenes import Scene
from fmdeploy.task import Array


def scene(*tracks: Array, lanes: Array | None = None) -> Scene:
    """A scene from one (T, 6) track a vehicle; the first is the ego. Along is x."""
    box = np.stack(tracks, axis=1)
    lane = np.zeros(box.shape[:2], int) if lanes is None else lanes
    return Scene("highway", 0, (), box, lane, box[..., 0], (0,))


def drive(x: float, y: float, speed: float, heading: float = 0.0, frames: int = 20) -> Array:
    """A car of 5 x 2 m at constant speed, five frames a second."""
    travelled = speed * 0.2 * np.arange(frames)
    state = (x + travelled * np.cos(heading), y + travelled * np.sin(heading), np.full(frames, heading))
    return np.stack([*state, np.full(frames, speed), np.full(frames, 5.0), np.full(frames, 2.0)], axis=1)


def test_time_to_a_slower_car_ahead_is_gap_over_closing_speed() -> None:
    ttc = time_to_collision(scene(drive(0, 0, 20), drive(35, 0, 10)), 0)
    assert ttc[0] == pytest.approx(3.0)  # 30 m between bumpers at 10 m/s
    assert ttc[5] == pytest.approx(2.0)
    cases = rare_cases(scene(drive(0, 0, 20), drive(35, 0, 10)), 0)
    assert cases["rare_near_collision"].tolist() == [False] * 6 + [True] * 14
    assert {key: value.dtype for key, value in cases.items()} == {
        "ttc": np.float32, "rare_near_collision": np.bool_, "rare_cut_in": np.bool_}


def test_no_collision_with_the_next_lane_a_faster_leader_or_one_left_behind() -> None:
    for other in (drive(35, 4, 10), drive(35, 0, 30), drive(-30, 0, 10)):
        assert np.isinf(time_to_collision(scene(drive(0, 0, 20), other), 0)).all()
    assert np.isinf(time_to_collision(scene(drive(0, 0, 20), drive(500, 0, 0)), 0)).all()  # out of reach of the grid


def test_crossing_traffic_collides_where_paths_and_times_meet() -> None:
    meets = drive(20, 20, 10, heading=-np.pi / 2)
    late = drive(20, 60, 10, heading=-np.pi / 2)
    assert time_to_collision(scene(drive(0, 0, 10), meets), 0)[0] == pytest.approx(1.65)  # (20 - 2.5 - 1) / 10
    assert np.isinf(time_to_collision(scene(drive(0, 0, 10), late), 0)[0])


def test_touching_cars_have_no_time_left() -> None:
    assert time_to_collision(scene(drive(0, 0, 10), drive(4, 0, 10)), 0)[0] == 0


@pytest.mark.parametrize(("gap", "expected"), [(12.0, True), (30.0, False), (-12.0, False)])
def test_cut_in_is_a_car_that_enters_the_lane_shortly_ahead(gap: float, expected: bool) -> None:
    lanes = np.zeros((20, 2), int)
    lanes[:6, 1] = 1
    found = cut_ins(scene(drive(0, 0, 20), drive(5 + gap, 0, 20), lanes=lanes), 0)
    assert found[:6].any() == False  # noqa: E712
    assert found[6:17].all() == expected
    assert not found[17:].any()  # over after two seconds


def test_a_lane_change_of_the_ego_is_no_cut_in() -> None:
    lanes = np.zeros((20, 2), int)
    lanes[:6, 0] = 1
    assert not cut_ins(scene(drive(0, 0, 20), drive(17, 0, 20), lanes=lanes), 0).any()

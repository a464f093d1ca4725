"""Grids: where a cell lies, which cells a box covers, what a beam meets."""

from __future__ import annotations

import numpy as np
import pytest

from fmdeploy.data.highway import Lane
from fmdeploy.data.raster import cell_centres, draw_boxes, draw_drivable, draw_lines, draw_points, to_ego
from fmdeploy.data.sensors import BEAMS, SIGHT_M, camera, cast, lidar
from fmdeploy.data.weather import CAMERA, LIDAR, WEATHERS, CameraQuality, LidarQuality
from fmdeploy.task import Array

PERFECT_LIDAR = LidarQuality(range_m=60, dropout=0, clutter=0, noise_m=0)
PERFECT_CAMERA = CameraQuality(range_m=60, half_fov_deg=75, miss=0, depth_noise=0, label_noise=0)


def boxes(*rows: tuple[float, float, float, float, float]) -> Array:
    """(1, N, 5): x, y, yaw, length, width."""
    return np.array([rows], float)


def test_row_0_is_ahead_and_column_0_is_left() -> None:
    centres = cell_centres()
    assert centres[0, 0].tolist() == [31.5, 31.5]
    assert centres[63, 63].tolist() == [-31.5, -31.5]
    ahead_left = draw_points(np.array([[[20.5, 10.5]]]))[0]
    assert np.argwhere(ahead_left).tolist() == [[11, 21]]


def test_ego_frame_turns_with_the_heading() -> None:
    ego = np.array([[10.0, 5.0, np.pi / 2, 0, 5, 2]])  # heads along +y of the world, which points south
    point = to_ego(np.array([[[10.0, 8.0], [13.0, 5.0]]]), ego)[0]
    assert np.allclose(point, [[3, 0], [0, 3]])  # 3 m ahead; east of a southbound car is on its left


def test_box_covers_as_many_cells_as_square_metres() -> None:
    straight = draw_boxes(boxes((10.2, 0, 0, 5, 2)))[0]
    assert straight.sum() == 10
    assert set(np.argwhere(straight)[:, 1]) == {31, 32}
    turned = [draw_boxes(boxes((10.3, 4.2, yaw, 5, 2)))[0].sum() for yaw in np.linspace(0, np.pi, 60)]
    assert 9.5 < np.mean(turned) < 10.5


def test_absent_and_distant_boxes_leave_no_trace() -> None:
    assert not draw_boxes(boxes((np.nan,) * 5, (80, 0, 0, 5, 2))).any()
    edge = draw_boxes(boxes((32, 0, 0, 5, 2)))[0]
    assert edge.sum() == 6
    assert set(np.argwhere(edge)[:, 0]) == {0, 1, 2}


def test_a_vehicle_hides_what_is_behind_it() -> None:
    near, far, beside = (10.0, 0.0, 0.0, 5.0, 2.0), (20.0, 0.0, 0.0, 5.0, 1.6), (0.0, 10.0, 0.0, 5.0, 2.0)
    scene = boxes(near, far, beside)
    sight = cast(scene)
    assert set(sight.seen_TA[0]) == {-1, 0, 2}  # no beam reaches the far one
    hit, free = (plane[0] for plane in lidar(sight, PERFECT_LIDAR, np.random.default_rng(0)))
    shadow = slice(10, 20), slice(31, 33)  # x from 12 to 22 m, straight ahead
    assert not hit[shadow].any()
    assert not free[shadow].any()
    assert free[26:31, 31:33].all()  # up to 5 m ahead
    assert hit[24, 31:33].all()  # the rear of the near one, 7.5 m ahead
    assert hit[29:35, 22].any()  # the near side of the one beside: y from 9 m
    assert not hit[29:35, 21].any()  # not its far side
    assert free[:, :20].sum() > 0.8 * free[:, 44:].sum()
    view = camera(scene, sight, PERFECT_CAMERA, np.random.default_rng(0))[0][0]
    assert np.array_equal(view, draw_boxes(boxes(near))[0])  # the one beside is outside the field of view


@pytest.mark.parametrize("yaw", [0.0, 0.4, 2.0])
def test_beams_end_on_the_outline_of_a_box(yaw: float) -> None:
    x, y, length, width = 12.0, -7.0, 5.0, 2.0
    sight = cast(boxes((x, y, yaw, length, width)))
    beams = np.flatnonzero(sight.seen_TA[0] == 0)
    angle = beams * 2 * np.pi / BEAMS - np.pi
    offset = sight.distance_TA[0, beams, None] * np.stack([np.cos(angle), np.sin(angle)], -1) - (x, y)
    along = np.abs(offset @ [np.cos(yaw), np.sin(yaw)])
    across = np.abs(offset @ [-np.sin(yaw), np.cos(yaw)])
    assert len(beams) > 20
    assert np.allclose(np.maximum(along - length / 2, across - width / 2), 0, atol=1e-3)
    assert (sight.distance_TA[0][sight.seen_TA[0] < 0] == SIGHT_M).all()


def test_each_weather_degrades_each_sensor_its_own_way() -> None:
    rng = np.random.default_rng(1)
    ring = [(r * np.cos(a), r * np.sin(a), a, 4.5, 1.9) for r in (8.0, 16.0, 24.0) for a in np.arange(0, 6, 0.9) + r]
    scene = np.repeat(boxes(*ring), 40, axis=0)
    sight = cast(scene)
    hit, free, seen, view = {}, {}, {}, {}
    for weather in WEATHERS:
        hits, frees = lidar(sight, LIDAR[weather], rng)
        vehicles, views = camera(scene, sight, CAMERA[weather], rng)
        hit[weather], free[weather], seen[weather], view[weather] = (
            float(plane.mean()) for plane in (hits, frees, vehicles, views)
        )
    assert free["fog"] < 0.5 * free["rain"] < 0.5 * free["clear"]
    assert hit["night"] == pytest.approx(hit["clear"], rel=0.02)  # a lidar brings its own light
    assert seen["fog"] < seen["night"] < seen["rain"] < seen["clear"]
    assert view["fog"] < 0.7 * view["night"] < 0.7 * view["rain"] < 0.7 * view["clear"]


def test_roads_are_as_wide_as_their_lanes() -> None:
    lanes = tuple(Lane(("a", "b", i), 1000.0, 4.0, (3, 1), (0.0, 4.0 * i), 0.0) for i in range(2))
    ego = np.array([[500.0, 0.0, 0.0, 20, 5, 2], [502.0, 0.0, 0.0, 20, 5, 2]])
    drivable = draw_drivable(lanes, ego)
    assert drivable.sum(axis=2).tolist() == [[8] * 64] * 2
    assert set(np.argwhere(drivable[0])[:, 1]) == set(range(30, 38))  # 2 m to the left, 6 m to the right
    lines = draw_lines(lanes, ego)
    assert lines[0, :, 30].sum() + lines[0, :, 29].sum() == 64  # solid, at 2 m to the left
    dashed = lines[0, :, 38] | lines[0, :, 37]
    assert 40 < dashed.sum() < 64


def test_arc_lanes_run_around_their_centre() -> None:
    arc = Lane(("a", "b", 0), 20 * np.pi, 4.0, (0, 0), (0.0, 0.0), 0.0, radius=20.0, turn=1)
    points = arc.points(np.linspace(0, 20 * np.pi, 50), np.zeros(50))
    assert np.allclose(np.hypot(*points.T), 20)
    assert np.allclose(points[0], [20, 0])
    ego = np.array([[0.0, 0.0, 0.0, 0, 5, 2]])
    drivable = draw_drivable((arc,), ego)[0]
    distance = np.hypot(*cell_centres()[drivable].T)
    assert 17.3 < distance.min() < distance.max() < 22.7
    assert drivable.sum() == pytest.approx(np.pi * (22**2 - 18**2) / 2, rel=0.05)

"""Two sensors on the roof of the ego, as bird's-eye planes: a lidar by ray casting, a camera by a semantic raster.

Lidar: 512 beams around. A beam ends at the first vehicle it meets: that cell is `hit`, the cells before it are
`free`, those behind it are neither (unseen). Camera: vehicles that the view is not blocked to, as whole boxes with an
error of distance; drivable area and lane markings where the view reaches. Weather degrades both, see weather.py.
"""

# T frames, N vehicles, A beams, P = 4096 cells, G = 64 rows or columns; ego frame: x ahead, y left

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.data.raster import (
    CELL_M,
    GRID,
    boxes_in_ego_frame,
    cell_centres,
    draw_boxes,
    draw_drivable,
    draw_lines,
    draw_points,
)
from fmdeploy.data.rigs import DEFAULT_RIG, RIGS, RigName
from fmdeploy.data.scenes import Scene
from fmdeploy.data.weather import CameraQuality, LidarQuality, Weather

BEAMS = 512
SIGHT_M = 60.0
"""Beams are cast this far; every cell of the grid is nearer."""
PLANES = ("lidar_hit", "lidar_free", "camera_vehicle", "camera_drivable", "camera_line", "occupancy", "drivable")
_ASIDE_M = 0.71 * CELL_M
_BEAM_A = (np.arange(BEAMS) * (2 * np.pi / BEAMS) - np.pi).astype(np.float32)
_CENTRES = cell_centres().reshape(-1, 2)
_CELL_DISTANCE_P = np.hypot(_CENTRES[:, 0], _CENTRES[:, 1]).astype(np.float32)
_CELL_ANGLE_P = np.arctan2(_CENTRES[:, 1], _CENTRES[:, 0])
_CELL_BEAM_P = np.round((_CELL_ANGLE_P + np.pi) / (2 * np.pi / BEAMS)).astype(int) % BEAMS


class Sight(NamedTuple):
    """Where beams from the ego end, without any weather."""

    distance_TA: Array
    """float32: metres to the first vehicle; SIGHT_M where there is none."""
    seen_TA: Array
    """int: column of that vehicle; -1 where there is none."""


def observe(
    scene: Scene, ego: int, weather: Weather, rng: np.random.Generator, rig: RigName = DEFAULT_RIG
) -> Arrays:
    """All planes of one ego, bool (T, 64, 64) each, named as in `PLANES`: sensors in `weather`, labels without."""
    beamer, camera_quality = RIGS[rig], RIGS[rig].camera(weather)
    ego_T6 = scene.box_TN6[:, ego]
    box_TN5 = boxes_in_ego_frame(scene.box_TN6, ego)
    sight = cast(box_TN5)
    drivable_TGG = draw_drivable(scene.lanes, ego_T6)
    line_TGG = draw_lines(scene.lanes, ego_T6)
    hit_TGG, free_TGG = lidar(sight, beamer.lidar(weather), rng, beamer.thinning)
    vehicle_TGG, view_TGG = camera(box_TN5, sight, camera_quality, rng)
    kept_TGG = view_TGG & (rng.random(view_TGG.shape, np.float32) >= camera_quality.label_noise)
    planes = (hit_TGG, free_TGG, vehicle_TGG, drivable_TGG & kept_TGG, line_TGG & kept_TGG,
              draw_boxes(box_TN5), drivable_TGG)
    return dict(zip(PLANES, planes, strict=True))


def cast(box_TN5: Array) -> Sight:
    """Cast all beams against all boxes (T, N, 5): the slab method, in each box's own frame."""
    frames, count = box_TN5.shape[:2]
    distance_TA = np.full((frames, BEAMS), SIGHT_M, np.float32)
    seen_TA = np.full((frames, BEAMS), -1)
    box_TN5 = box_TN5.astype(np.float32)
    for n in range(count):
        x, y, yaw, length, width = box_TN5[:, n, :, None].transpose(1, 0, 2)
        turned_TA = _BEAM_A - yaw
        cos_TA, sin_TA = np.cos(turned_TA), np.sin(turned_TA)
        along, across = -x * np.cos(yaw) - y * np.sin(yaw), x * np.sin(yaw) - y * np.cos(yaw)
        with np.errstate(divide="ignore", invalid="ignore"):
            enter_x, leave_x = _slab(along, cos_TA, length / 2)
            enter_y, leave_y = _slab(across, sin_TA, width / 2)
        enter_TA = np.maximum(enter_x, enter_y)
        nearer_TA = (enter_TA <= np.minimum(leave_x, leave_y)) & (enter_TA >= 0) & (enter_TA < distance_TA)
        distance_TA[nearer_TA] = enter_TA[nearer_TA]
        seen_TA[nearer_TA] = n
    return Sight(distance_TA, seen_TA)


def _slab(origin_T1: Array, direction_TA: Array, half_T1: Array) -> tuple[Array, Array]:
    """Distances at which rays enter and leave |coordinate| <= half."""
    centre_TA, half_TA = -origin_T1 / direction_TA, half_T1 / np.abs(direction_TA)
    return centre_TA - half_TA, centre_TA + half_TA


def lidar(sight: Sight, quality: LidarQuality, rng: np.random.Generator, thinning: int = 1) -> tuple[Array, Array]:
    """Planes `hit` and `free`, bool (T, 64, 64), of one sweep a frame by every `thinning`-th beam.

    A cell is free when the beam nearest to it passes it, and within half a cell's diagonal of its centre.
    """
    shape = sight.distance_TA.shape
    luck_TA = rng.random(shape, np.float32)
    noise_TA = rng.standard_normal(shape, np.float32) * quality.noise_m
    drops_TA = rng.standard_exponential(shape, np.float32) * 4 + 2
    clutter_TA = (luck_TA > 1 - quality.clutter) & (drops_TA < np.minimum(sight.distance_TA, quality.range_m))
    returned_TA = (luck_TA >= quality.dropout) & (sight.distance_TA < quality.range_m) | clutter_TA
    # a box's far half is not seen, so aim a quarter of a metre into it: its near cells then get the hits
    ends_TA = np.where(clutter_TA, drops_TA, sight.distance_TA + noise_TA + 0.25)
    point_TA2 = ends_TA[..., None] * np.stack([np.cos(_BEAM_A), np.sin(_BEAM_A)], -1)
    hit_TGG = draw_points(point_TA2, returned_TA & (np.arange(BEAMS) % thinning == 0))
    open_TA = np.where(luck_TA < quality.dropout, 0, np.minimum(ends_TA, quality.range_m))
    beam_P = np.round((_CELL_ANGLE_P + np.pi) / (2 * np.pi / BEAMS * thinning)).astype(int) * thinning % BEAMS
    aside_P = np.abs(np.sin(_CELL_ANGLE_P - _BEAM_A[beam_P])) * _CELL_DISTANCE_P
    passed_TP = open_TA[:, beam_P] - 0.75 * CELL_M > _CELL_DISTANCE_P
    free_TGG = (passed_TP & (aside_P < _ASIDE_M)).reshape(-1, GRID, GRID)
    return hit_TGG, free_TGG & ~hit_TGG


def camera(
    box_TN5: Array, sight: Sight, quality: CameraQuality, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Plane `vehicle`, bool (T, 64, 64), and the cells that the view reaches, bool (T, 64, 64)."""
    frames, count = box_TN5.shape[:2]
    half_fov = np.deg2rad(quality.half_fov_deg)
    ahead_A = np.abs(_BEAM_A) <= half_fov
    visible_TA = (sight.seen_TA >= 0) & ahead_A & (sight.distance_TA < quality.range_m)
    column_TA = np.where(visible_TA, sight.seen_TA, count) + np.arange(frames)[:, None] * (count + 1)
    beams_TN = np.bincount(column_TA.ravel(), minlength=frames * (count + 1)).reshape(frames, -1)[:, :count]
    found_TN = (beams_TN >= 2) & (rng.random((frames, count)) >= quality.miss)
    judged_TN = 1 + rng.standard_normal((frames, count)) * quality.depth_noise
    guess_TN5 = box_TN5.copy()
    guess_TN5[..., :2] *= judged_TN[..., None]
    guess_TN5[~found_TN] = np.nan
    reach_TA = np.minimum(sight.distance_TA, quality.range_m)
    view_P = np.abs(_CELL_ANGLE_P) <= half_fov
    view_TGG = (view_P & (reach_TA[:, _CELL_BEAM_P] > _CELL_DISTANCE_P)).reshape(-1, GRID, GRID)
    return draw_boxes(guess_TN5), view_TGG

"""Ego-centred bird's-eye grids: what is around a vehicle, in that vehicle's own frame at each instant.

Grid: 64 x 64 cells of 1 m with the ego in the middle. Row 0 is farthest ahead and row 63 farthest behind; column 0
is farthest left and column 63 farthest right, so that a picture of a grid has forward up and left on the left.
The centre of cell (row, column) lies at x = 31.5 - row metres ahead and y = 31.5 - column metres to the left.
Mirroring a scene left-right is flipping the last axis.
"""

# T frames, N vehicles, P points, G = 64 rows or columns; ego frame: x ahead, y left (world y points the other way)

from __future__ import annotations

import functools

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.data.highway import Lane
from fmdeploy.data.scenes import HEADING, LENGTH, WIDTH, X, Y

GRID = 64
CELL_M = 1.0
HALF_M = GRID * CELL_M / 2
REACH_M = HALF_M * np.sqrt(2.0)
_REACH = 5  # cells around a box's centre that are looked at: enough for boxes of 9 m
_MAP_CELL_M = 0.5
_SPACING_M = 0.35  # below 0.5 m / sqrt(2): every map cell of a lane gets a point, however the lane is turned
_INSET_M = 0.15  # a map cell that is touched counts whole; 2 x 0.15 m between two lanes still leaves no gap
_DASH_M, _DASH_PERIOD_M = 3.0, 4.33  # highway_env.road.graphics.LaneGraphics
_DASHED = 1


def cell_centres() -> Array:
    """Float64 (64, 64, 2): x ahead and y left of every cell's centre, in metres."""
    offset_G = HALF_M - CELL_M / 2 - CELL_M * np.arange(GRID)
    return np.stack(np.meshgrid(offset_G, offset_G, indexing="ij"), -1)


def to_ego(point_T_P2: Array, ego_T6: Array) -> Array:
    """World points (T, P, 2) or (1, P, 2) in the ego's frame at each instant: (T, P, 2), x ahead, y left, metres."""
    offset = point_T_P2 - ego_T6[:, None, X : Y + 1]
    cos, sin = np.cos(ego_T6[:, None, HEADING]), np.sin(ego_T6[:, None, HEADING])
    return np.stack([offset[..., 0] * cos + offset[..., 1] * sin, offset[..., 0] * sin - offset[..., 1] * cos], -1)


def boxes_in_ego_frame(box_TN6: Array, ego: int) -> Array:
    """The other vehicles in the frame of vehicle `ego`: (T, M, 5) x, y, yaw (left positive), length, width.

    Columns are those of `near_columns`; an absent vehicle is NaN.
    """
    ego_T6, others_TN6 = box_TN6[:, ego], box_TN6[:, near_columns(box_TN6, ego)]
    yaw_TN = ego_T6[:, None, HEADING] - others_TN6[..., HEADING]
    return np.concatenate(
        [to_ego(others_TN6[..., :2], ego_T6), yaw_TN[..., None], others_TN6[..., LENGTH : WIDTH + 1]], -1
    )


def near_columns(box_TN6: Array, ego: int) -> Array:
    """Numbers (M,) of the vehicles, the ego left out, that come within reach of its grid at some time."""
    offset_TN2 = box_TN6[..., :2] - box_TN6[:, ego, None, :2]
    near_N = (np.hypot(offset_TN2[..., 0], offset_TN2[..., 1]) < REACH_M + 10).any(axis=0)
    near_N[ego] = False
    return np.flatnonzero(near_N)


def draw_boxes(box_TN5: Array) -> Array:
    """Bool (T, 64, 64): cells whose centre lies in one of the boxes (T, N, 5) x, y, yaw, length, width."""
    grid_TGG = np.zeros((len(box_TN5), GRID, GRID), bool)
    centre_TN2 = box_TN5[..., :2]
    longest = np.nanmax(np.hypot(box_TN5[..., 3], box_TN5[..., 4]), initial=0.0)
    reach = max(_REACH, int(np.ceil(longest / 2 / CELL_M)))
    frame, number = np.nonzero((np.abs(centre_TN2) < HALF_M + reach + 1).all(axis=-1))
    box_P5 = box_TN5[frame, number]
    cell_PW2 = np.floor(HALF_M - box_P5[:, None, :2]).astype(int) + _window(reach)
    offset_PW2 = HALF_M - CELL_M / 2 - cell_PW2 - box_P5[:, None, :2]
    cos, sin = np.cos(box_P5[:, 2, None]), np.sin(box_P5[:, 2, None])
    along = np.abs(offset_PW2[..., 0] * cos + offset_PW2[..., 1] * sin) <= box_P5[:, 3, None] / 2
    across = np.abs(offset_PW2[..., 1] * cos - offset_PW2[..., 0] * sin) <= box_P5[:, 4, None] / 2
    hit = along & across & (cell_PW2 >= 0).all(-1) & (cell_PW2 < GRID).all(-1)
    cell_P2 = cell_PW2[hit]
    grid_TGG[np.broadcast_to(frame[:, None], hit.shape)[hit], cell_P2[:, 0], cell_P2[:, 1]] = True
    return grid_TGG


@functools.cache
def _window(reach: int) -> Array:
    """Offsets (W, 2) of the cells around a box's centre."""
    side = np.arange(-reach, reach + 1)
    return np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)


def draw_points(point_TP2: Array, keep_TP: Array | None = None) -> Array:
    """Bool (T, 64, 64): cells that hold one of the ego-frame points (T, P, 2)."""
    grid_TGG = np.zeros((len(point_TP2), GRID, GRID), bool)
    cell_TP2 = np.floor(HALF_M - point_TP2).astype(np.int32)
    inside = ((cell_TP2 >= 0) & (cell_TP2 < GRID)).all(axis=-1)
    frame, number = np.nonzero(inside if keep_TP is None else inside & keep_TP)
    cell_P2 = cell_TP2[frame, number]
    grid_TGG[frame, cell_P2[:, 0], cell_P2[:, 1]] = True
    return grid_TGG


def draw_drivable(lanes: tuple[Lane, ...], ego_T6: Array) -> Array:
    """Bool (T, 64, 64): cells whose centre lies on a lane."""
    low, high = ego_T6[:, :2].min(axis=0) - REACH_M - 1, ego_T6[:, :2].max(axis=0) + REACH_M + 1
    shape = np.ceil((high - low) / _MAP_CELL_M).astype(int) + 1
    chart = np.zeros(shape, bool)
    for lane in lanes:
        along_S = _stations(lane, low, high, _SPACING_M)
        edge = lane.width / 2 - _INSET_M
        lateral_S = np.linspace(-edge, edge, int(np.ceil(lane.width / _SPACING_M)) + 1)
        point_P2 = lane.points(np.repeat(along_S, len(lateral_S)), np.tile(lateral_S, len(along_S)))
        cell_P2 = np.floor((point_P2 - low) / _MAP_CELL_M).astype(int)
        cell_P2 = cell_P2[((cell_P2 >= 0) & (cell_P2 < shape)).all(axis=-1)]
        chart[cell_P2[:, 0], cell_P2[:, 1]] = True
    cell_TP2 = np.floor((_cells_in_world(ego_T6) - low) / _MAP_CELL_M).astype(int)
    return np.asarray(chart[cell_TP2[..., 0], cell_TP2[..., 1]].reshape(-1, GRID, GRID))


def draw_lines(lanes: tuple[Lane, ...], ego_T6: Array) -> Array:
    """Bool (T, 64, 64): cells that a lane marking crosses; dashes are 3 m long and 4.33 m apart."""
    low, high = ego_T6[:, :2].min(axis=0) - REACH_M, ego_T6[:, :2].max(axis=0) + REACH_M
    points = []
    for lane in lanes:
        along_S = _stations(lane, low, high, CELL_M / 2)
        for side, kind in zip((-0.5, 0.5), lane.lines, strict=True):
            marked_S = along_S[along_S % _DASH_PERIOD_M < _DASH_M] if kind == _DASHED else along_S
            if kind:
                points.append(lane.points(marked_S, np.full_like(marked_S, side * lane.width)))
    return draw_points(to_ego(np.concatenate(points)[None], ego_T6))


def _cells_in_world(ego_T6: Array) -> Array:
    """(T, 4096, 2): world positions of the cells' centres."""
    x_P, y_P = cell_centres().reshape(-1, 2).T
    cos, sin = np.cos(ego_T6[:, HEADING, None]), np.sin(ego_T6[:, HEADING, None])
    return np.asarray(ego_T6[:, None, X : Y + 1] + np.stack([x_P * cos + y_P * sin, x_P * sin - y_P * cos], -1))


def _stations(lane: Lane, low: Array, high: Array, spacing: float) -> Array:
    """Places along a lane, `spacing` metres apart and counted from its start, that may lie in the box low..high."""
    first, last = 0.0, lane.length
    if not lane.turn:
        corner_42 = np.array([(x, y) for x in (low[0], high[0]) for y in (low[1], high[1])]) - lane.start
        along_4 = corner_42 @ [np.cos(lane.angle), np.sin(lane.angle)]
        first, last = max(first, along_4.min()), min(last, along_4.max())
    return np.arange(np.ceil(first / spacing), np.floor(last / spacing) + 1) * spacing

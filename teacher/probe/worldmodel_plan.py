"""A simple planning cost on occupancy: how many occupied cells the ego would sweep if it left its path.

The frames to come are drawn in the ego's own frame at each instant, so a candidate is how far it leaves the path that
the ego is driving anyway: it brakes or speeds up more, or moves over. Driving on is one of them.

Legend: N samples, R candidates, T later frames, H W cells.
"""

from __future__ import annotations

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.data.raster import GRID, cell_centres

LENGTH_M, WIDTH_M = 5.0, 2.0  # of the ego
MARGIN_M = 1.0  # on every side
PERIOD_S = 0.2
LANE_M, CHANGE_S = 4.0, 1.6  # how far to move over, and in what time
CANDIDATES = {  # metres per second squared ahead, lanes to the left
    "keep": (0.0, 0.0), "brake": (-6.0, 0.0), "speed up": (4.0, 0.0), "left": (0.0, 1.0), "right": (0.0, -1.0),
    "left faster": (4.0, 1.0), "right slower": (-6.0, -1.0),
}


def deviations(offsets: tuple[int, ...]) -> Array:
    """Metres ahead and to the left of the driven path, float64 (R, T, 2)."""
    time_T = PERIOD_S * np.asarray(offsets, np.float64)
    aside_T = LANE_M * (1 - np.cos(np.pi * np.minimum(time_T / CHANGE_S, 1))) / 2
    rows = [(0.5 * push * time_T**2, lanes * aside_T) for push, lanes in CANDIDATES.values()]
    return np.stack([np.stack(row, -1) for row in rows])


def footprints(offsets: tuple[int, ...], side: int) -> Array:
    """Cells under the ego and its margin, float32 (R, T, side, side), for a grid of `side` x `side` cells.

    A coarse cell counts by the share of its 1 m cells that are covered.
    """
    centre_GG2 = cell_centres()
    away = np.abs(centre_GG2 - deviations(offsets)[:, :, None, None])
    inside = (away[..., 0] <= LENGTH_M / 2 + MARGIN_M) & (away[..., 1] <= WIDTH_M / 2 + MARGIN_M)
    step = GRID // side
    shares = inside.reshape(*inside.shape[:2], side, step, side, step).mean((3, 5))
    return np.asarray(shares, np.float32)


def costs(occupancy_NTHW: Array, offsets: tuple[int, ...]) -> Array:
    """Expected number of occupied cells swept by each candidate, float64 (N, R).

    Args:
        occupancy_NTHW: Probabilities, or zeros and ones.
        offsets: The frames ahead (T).
    """
    mask = footprints(offsets, occupancy_NTHW.shape[-1])
    flat = np.asarray(occupancy_NTHW, np.float32).reshape(len(occupancy_NTHW), -1)
    return np.asarray(flat @ mask.reshape(len(mask), -1).T, np.float64)

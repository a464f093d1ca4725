"""Predictions of `bev-occupancy` that need no network: what the sensors show now is taken to stay.

Legend: B batch, C channels, H W rows and columns of the grid.
"""

from __future__ import annotations

import numpy as np

from fmdeploy.arrays import Array, Arrays

SURE = 8.0  # logit of a probability of 0.9997
# Channels of the newest frame, from the end: lidar (hit, free), camera (vehicle, drivable, line).
HIT, VEHICLE, DRIVABLE = -2, -3, -2


def copy_lidar(inputs: Arrays, *, horizons: int, scenes: int) -> Arrays:
    """Cells with a lidar hit are occupied, now and later."""
    return _outputs(inputs, inputs["lidar"][:, HIT] > 0, horizons, scenes)


def copy_both(inputs: Arrays, *, horizons: int, scenes: int) -> Arrays:
    """Cells with a lidar hit or a vehicle in the camera are occupied, now and later."""
    return _outputs(inputs, (inputs["lidar"][:, HIT] > 0) | (inputs["camera"][:, VEHICLE] > 0), horizons, scenes)


def _outputs(inputs: Arrays, occupied_BHW: Array, horizons: int, scenes: int) -> Arrays:
    """Logits `bev` (B, horizons + 1, H, W) and an undecided `scene` (B, scenes)."""
    planes = [occupied_BHW] * horizons + [inputs["camera"][:, DRIVABLE] > 0]
    bev_BCHW = np.where(np.stack(planes, axis=1), SURE, -SURE).astype(np.float32)
    return {"bev": bev_BCHW, "scene": np.zeros((len(bev_BCHW), scenes), np.float32)}

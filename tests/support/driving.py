"""Drive a road's vehicles, by our own steps or by highway-env's."""

from __future__ import annotations

from typing import Any

import numpy as np

from fmdeploy.data.traffic import Traffic
from fmdeploy.task import Array


def drive(road: Any, *, fast: bool, steps: int) -> Array:
    """(steps, N, 4): x, y, heading and speed of all vehicles after each tenth of a second."""
    traffic, track = Traffic(road) if fast else None, []
    for _ in range(steps):
        if traffic is not None:
            traffic.step(0.1)
        else:
            road.act()
            road.step(0.1)
        track.append([(*v.position, v.heading, v.speed) for v in road.vehicles])
    return np.array(track)

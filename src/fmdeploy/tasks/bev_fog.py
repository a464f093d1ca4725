"""Fog over finished inputs: the farther a cell, the likelier nothing is seen in it.

A ray survives the distance d with probability exp(-3.912 d / V) at a visibility of V metres (Koschmieder's law with the
2 % contrast threshold, Middleton 1952, chapter 6). It thins what the recorded sensors saw; it adds no returns from
droplets, and it comes on top of the weather that was recorded.
"""

from __future__ import annotations

import functools

import numpy as np

from fmdeploy.arrays import Array, Arrays

KOSCHMIEDER = 3.912
CELL_M = 1.0


def fog(inputs: Arrays, rng: np.random.Generator, *, visibility_m: float) -> Arrays:
    """Remove cells of all planes (C, H, W) by their distance from the ego; a cell is lost in all planes or in none."""
    return {name: _thinned(value, rng, visibility_m) for name, value in inputs.items()}


def _thinned(value: Array, rng: np.random.Generator, visibility_m: float) -> Array:
    survives_HW = np.exp(-KOSCHMIEDER * _distance_m(*value.shape[1:]) / visibility_m)
    return np.where(rng.random(value.shape[1:]) < survives_HW, value, np.zeros((), value.dtype))


@functools.cache
def _distance_m(rows: int, columns: int) -> Array:
    """Distance of each cell's middle from the ego, which stands in the middle of the grid (H, W)."""
    y, x = np.mgrid[0.5:rows, 0.5:columns]
    return np.asarray(np.hypot(y - rows / 2, x - columns / 2) * CELL_M)

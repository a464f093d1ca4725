"""Frames that move like a sensor's, and guards for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from fmdeploy.iospec import IOSpec
from fmdeploy.runtime import GuardConfig, Reason
from fmdeploy.runtime.bundle import InputStatistics
from fmdeploy.runtime.guards.content import SAMPLES, Guards
from support.bundles import Arrays, inputs, io_spec, statistics

PERIOD_MS = 100.0  # of a camera at 10 Hz


def known(batch: Arrays) -> dict[str, InputStatistics]:
    """What the guards are told of a calibration batch."""
    return {name: InputStatistics(**found) for name, found in statistics(batch)["inputs"].items()}


def guards_of(
    io: IOSpec | None = None, batch: Arrays | None = None, config: GuardConfig = SAMPLES, **options: Any
) -> Guards:
    """Guards of the toy inputs, or of others with their own calibration batch."""
    return Guards(io or io_spec(), known(batch if batch is not None else inputs(64, seed=100)), config, **options)


def reasons(guards: Guards, frame: Arrays) -> list[Reason]:
    """Codes of one frame."""
    return [found.code for found in guards.before(frame).findings]


def pictures(count: int, size: int = 32, seed: int = 0, *, shade: float = 0.5) -> np.ndarray[Any, Any]:
    """Smooth colour pictures (count, 3, size, size) in 0..1 with sensor noise; red is bright and blue is dark."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:size, 0:size] / size
    found = np.empty((count, 3, size, size), np.float32)
    for number in range(count):
        phase, turns = rng.uniform(0, 2 * np.pi, 2), rng.uniform(2, 5, 2)
        wave = np.sin(2 * np.pi * turns[0] * rows + phase[0]) * np.sin(2 * np.pi * turns[1] * columns + phase[1])
        checks = ((np.floor(8 * rows) + np.floor(8 * columns)) % 2) - 0.5
        picture = shade + 0.15 * wave + 0.2 * checks + rng.normal(0, 0.02, (size, size))
        for channel, offset in enumerate((0.2, 0.0, -0.2)):
            found[number, channel] = picture + offset + rng.normal(0, 0.01, (size, size))
    return np.clip(found, 0, 1)

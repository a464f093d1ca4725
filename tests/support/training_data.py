"""Tiny driving scenes that cost nothing to make: two moving boxes a sequence, drawn straight into the stored planes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fmdeploy.artifact import Artifact
from fmdeploy.config import StageConfig
from fmdeploy.data.writer import DatasetWriter
from fmdeploy.draft import Draft, produce
from fmdeploy.manifest import Kind
from fmdeploy.tasks.bev_occupancy_samples import SCENES

FRAMES = 16  # samples at t = 3, 5, 7: three a sequence
TEACHER = {"dim": 16, "depth": 1, "heads": 2, "stem_width": 8, "width": 16, "precision": "fp32", "batch": 4}
STUDENT = {"stem_width": 8, "width": 8, "precision": "fp32", "batch": 4, "steps": 12, "lr": 1e-3}


class _Scenes(StageConfig):
    seed: int
    sequences: int


def write_scenes(out: Path, *, seed: int = 0, sequences: int = 16, per_shard: int = 64) -> Artifact:
    """A DATASET of `sequences` sequences of 16 frames, two a simulation: 3/4 train, 1/8 val, 1/8 test."""
    config = _Scenes(seed=seed, sequences=sequences)
    return produce(out, Kind.DATASET, stage="data scenes", config=config, inputs={},
                   build=lambda draft: _build(draft, seed, sequences, per_shard))


def _build(draft: Draft, seed: int, sequences: int, per_shard: int) -> None:
    writer, names = DatasetWriter(draft, per_shard=per_shard), [f"s{number:03d}" for number in range(sequences)]
    for number, name in enumerate(names):
        metadata = {"scenario": SCENES[number % 8], "weather": "clear", "seed": number // 2,
                    "simulation": f"{seed}-{number // 2}"}
        writer.add(name, _sequence(np.random.default_rng((seed, number))), metadata)
    train, val = sequences * 3 // 4, sequences * 7 // 8
    writer.close({"train": names[:train], "val": names[train:val], "test": names[val:]})


def _sequence(rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    occupancy = np.zeros((FRAMES, 64, 64), np.uint8)
    for row, column, speed in rng.integers((4, 8, -2), (52, 52, 3), (2, 3)):
        for t in range(FRAMES):
            top = int(np.clip(row + speed * t, 0, 58))
            occupancy[t, top : top + 5, column : column + 3] = 1
    drivable = np.zeros_like(occupancy)
    drivable[:, :, 6:58] = 1
    noise = (rng.random(occupancy.shape) < 0.01).astype(np.uint8)
    planes = {"lidar_hit": occupancy | noise, "lidar_free": 1 - occupancy, "camera_vehicle": occupancy,
              "camera_drivable": drivable, "camera_line": noise, "occupancy": occupancy, "drivable": drivable}
    packed: dict[str, np.ndarray[Any, Any]] = {
        name: np.packbits(plane.reshape(FRAMES, -1), axis=1) for name, plane in planes.items()
    }
    return packed | {"ttc": np.full(FRAMES, 9, np.float32), "rare_cut_in": np.zeros(FRAMES, bool),
                     "rare_near_collision": np.zeros(FRAMES, bool)}

"""Driving scenes with a planted rule: the picture is nearly full or empty, and what comes next can be known.

`clock`: the two take turns, so persistence is always wrong and the past says all. `driver`: the ego's motion decides, at
random, so only who is told the motion can know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from fmdeploy.artifact import Artifact
from fmdeploy.config import StageConfig
from fmdeploy.data.writer import DatasetWriter
from fmdeploy.draft import Draft, produce
from fmdeploy.manifest import Kind
from fmdeploy.tasks.bev_occupancy_samples import SCENES

FRAMES = 16
Rule = Literal["clock", "driver"]
SIZES = {"dim": 16, "depth": 1, "heads": 2, "stem_width": 8, "width": 16, "precision": "fp32", "batch": 4, "lr": 5e-3}
SETTINGS = ("worldmodel.grid=8", "worldmodel.codes=16", "worldmodel.code_dim=4", "worldmodel.hidden=32",
            "worldmodel.width=16", "worldmodel.depth=1", "worldmodel.heads=2", "worldmodel.forget=0")


class _Config(StageConfig):
    rule: Rule
    sequences: int


def write_blinking(out: Path, rule: Rule, *, sequences: int = 16) -> Artifact:
    """A DATASET of `sequences` sequences of 16 frames: half train, the rest val and test."""
    return produce(out, Kind.DATASET, stage="data blinking", config=_Config(rule=rule, sequences=sequences), inputs={},
                   build=lambda draft: _build(draft, rule, sequences))


def _build(draft: Draft, rule: Rule, sequences: int) -> None:
    writer, names = DatasetWriter(draft), [f"s{number:03d}" for number in range(sequences)]
    for number, name in enumerate(names):
        metadata = {"scenario": SCENES[number % 8], "weather": "clear", "seed": number, "simulation": str(number)}
        writer.add(name, _sequence(number, rule), metadata)
    train, val = sequences // 2, sequences * 5 // 8
    writer.close({"train": names[:train], "val": names[train:val], "test": names[val:]})


def _sequence(number: int, rule: Rule) -> dict[str, np.ndarray[Any, Any]]:
    drawn = np.random.default_rng(number).integers(0, 2, FRAMES)
    phase = (np.arange(FRAMES) + number) % 2 if rule == "clock" else drawn
    pattern = np.zeros((2, 64, 64), np.uint8)
    pattern[1, 8:56] = 1
    occupancy, empty = pattern[phase], np.zeros((FRAMES, 64, 64), np.uint8)
    planes = {"lidar_hit": occupancy, "lidar_free": 1 - occupancy, "camera_vehicle": occupancy, "camera_drivable": empty,
              "camera_line": empty, "occupancy": occupancy, "drivable": empty}
    packed: dict[str, np.ndarray[Any, Any]] = {
        name: np.packbits(plane.reshape(FRAMES, -1), axis=1) for name, plane in planes.items()}
    motion = np.stack([3.0 * phase, 0 * phase, 0 * phase], 1).astype(np.float32)
    return packed | {"ego_motion": motion, "ttc": np.full(FRAMES, 9, np.float32),
                     "rare_cut_in": np.zeros(FRAMES, bool), "rare_near_collision": np.zeros(FRAMES, bool)}

"""A small set in the nuScenes format: two logs, three scenes, two sensors, moving and standing vehicles, one person."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Record = dict[str, Any]
CATEGORIES = ("vehicle.car", "vehicle.bus.rigid", "human.pedestrian.adult", "movable_object.barrier")
SIZES = {"vehicle.car": (1.9, 4.5, 1.6), "vehicle.bus.rigid": (2.9, 11.5, 3.4), "human.pedestrian.adult": (0.7, 0.7, 1.8),
         "movable_object.barrier": (2.0, 0.5, 1.0)}  # width, length, height, as the format has it
SENSORS = {"LIDAR_TOP": ("lidar", (0.9, 0.0, 1.8), 0.03), "CAM_FRONT": ("camera", (1.7, 0.1, 1.5), -0.01)}


def quaternion(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> list[float]:
    """w, x, y, z of a rotation about z, then y, then x."""
    (cy, sy), (cp, sp), (cr, sr) = ((math.cos(a / 2), math.sin(a / 2)) for a in (yaw, pitch, roll))
    return [cr * cp * cy + sr * sp * sy, sr * cp * cy - cr * sp * sy, cr * sp * cy + sr * cp * sy,
            cr * cp * sy - sr * sp * cy]


class Maker:
    """Collects records and writes them."""

    def __init__(self, root: Path, version: str, seed: int) -> None:
        self.root, self.version, self.rng = root, version, np.random.default_rng(seed)
        self.tables: dict[str, list[Record]] = {name: [] for name in (
            "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
            "sample_annotation", "sample_data", "scene", "sensor", "visibility")}

    def add(self, table: str, **values: Any) -> str:
        token = f"{table}-{len(self.tables[table]):04d}"
        self.tables[table].append({"token": token, **values})
        return token

    def write(self) -> Path:
        folder = self.root / self.version
        folder.mkdir(parents=True)
        for name, records in self.tables.items():
            (folder / f"{name}.json").write_text(json.dumps(records))
        return self.root


def write_nuscenes(root: Path, *, version: str = "v1.0-mini", samples: int = 5, points: bool = True, seed: int = 0) -> Path:
    """Write the tables, and point clouds below `samples/LIDAR_TOP`."""
    maker = Maker(root, version, seed)
    categories = {name: maker.add("category", name=name, description="") for name in CATEGORIES}
    visibility = maker.add("visibility", level="v80-100", description="")
    maker.add("attribute", name="vehicle.moving", description="")
    sensors = {channel: maker.add("sensor", channel=channel, modality=modality)
               for channel, (modality, _, _) in SENSORS.items()}
    logs = [maker.add("log", logfile=f"n00{k}-2018-07-2{k}", vehicle=f"n00{k}", date_captured=f"2018-07-2{k}", location=place)
            for k, place in enumerate(("singapore-onenorth", "boston-seaport"))]
    (root / "maps").mkdir(parents=True)
    Image.new("L", (8, 8)).save(root / "maps" / "m.png")
    maker.add("map", category="semantic_prior", filename="maps/m.png", log_tokens=logs)
    for number, log in enumerate((logs[0], logs[0], logs[1])):
        _scene(maker, number, log, sensors, categories, visibility, samples, points)
    return maker.write()


def _scene(maker: Maker, number: int, log: str, sensors: dict[str, str], categories: dict[str, str], visibility: str,
           samples: int, points: bool) -> None:
    rng, start_us = maker.rng, 1_532_400_000_000_000 + number * 20_000_000
    calibrated = {channel: maker.add(
        "calibrated_sensor", sensor_token=sensors[channel], translation=list(place), rotation=quaternion(yaw, 0.02, -0.01),
        camera_intrinsic=[[1266.4, 0, 816.3], [0, 1266.4, 491.5], [0, 0, 1]] if kind == "camera" else [],
    ) for channel, (kind, place, yaw) in SENSORS.items()}
    scene = maker.add("scene", name=f"scene-{number:04d}", description="Rain, parked cars", log_token=log,
                      nbr_samples=samples, first_sample_token="", last_sample_token="")
    tokens = [f"sample-{len(maker.tables['sample']) + k:04d}" for k in range(samples)]
    yaw0, origin = rng.uniform(-3, 3), rng.uniform(300, 900, 2)
    things = [(name, rng.uniform(-25, 25, 2), rng.uniform(-3, 3), rng.uniform(0, 4)) for name in CATEGORIES for _ in range(3)]
    instances = [maker.add("instance", category_token=categories[name], nbr_annotations=samples,
                           first_annotation_token="", last_annotation_token="") for name, *_ in things]
    for k, token in enumerate(tokens):
        yaw, time_us = yaw0 + 0.05 * k, start_us + 500_000 * k
        place = origin + 2.0 * k * np.array([math.cos(yaw0), math.sin(yaw0)])
        maker.add("sample", timestamp=time_us, scene_token=scene, prev=tokens[k - 1] if k else "",
                  next=tokens[k + 1] if k + 1 < samples else "")
        for channel, sensor in calibrated.items():
            pose = maker.add("ego_pose", timestamp=time_us, translation=[*place, 0.3],
                             rotation=quaternion(yaw, 0.01, 0.005))
            name = f"samples/{channel}/{token}.{'pcd.bin' if channel == 'LIDAR_TOP' else 'jpg'}"
            maker.add("sample_data", sample_token=token, ego_pose_token=pose, calibrated_sensor_token=sensor,
                      timestamp=time_us, fileformat="pcd", is_key_frame=True, height=900, width=1600, filename=name,
                      prev="", next="")
            if channel == "LIDAR_TOP" and points:
                _points(maker, name)
        for (kind, offset, turn, speed), instance in zip(things, instances, strict=True):
            moved = offset + origin + speed * 0.5 * k * np.array([math.cos(turn), math.sin(turn)])
            maker.add("sample_annotation", sample_token=token, instance_token=instance, visibility_token=visibility,
                      attribute_tokens=[], translation=[*moved, 1.1], size=list(SIZES[kind]), rotation=quaternion(turn),
                      num_lidar_pts=5, num_radar_pts=0, prev="", next="")
    maker.tables["scene"][-1].update(first_sample_token=tokens[0], last_sample_token=tokens[-1])


def _points(maker: Maker, name: str) -> None:
    path = maker.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    points = np.concatenate([maker.rng.uniform(-40, 40, (200, 2)), maker.rng.uniform(-2, 3, (200, 1)),
                             maker.rng.uniform(0, 30, (200, 2))], axis=1)
    points.astype(np.float32).tofile(path)

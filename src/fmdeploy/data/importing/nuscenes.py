"""nuScenes scenes as drives: boxes and occupancy in the ego's frame, its motion, the rig and the map version.

Frames are the key frames (2 a second), with the ego where it was at the key frame of `reference` (LIDAR_TOP). Arrays:

    boxes        float32 (T, N, 7)   x ahead, y left, z up (m, of the centre), length, width, height (m), yaw (rad, left
                                     positive); zeros behind the last box
    box_class    int64 (T, N)        number in metadata `classes`; -1 behind the last box
    occupancy    uint8 (T, 512)      vehicles on the grid of 64 x 64 cells of 1 m, as `data record` packs it
    ego_motion   float32 (T, 3)      see data/motion.py
    time_us      int64 (T,)
    lidar_hit    uint8 (T, 512)      cells with a return, where the point clouds are there

Legend: T frames, N boxes, P points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.data.importing.drives import Drive, require_inside, safe_id
from fmdeploy.data.importing.nuscenes_tables import Record, Tables
from fmdeploy.data.raster import draw_boxes, draw_points
from fmdeploy.errors import DataError

REFERENCE = "LIDAR_TOP"
VEHICLES = "vehicle."
POINT_FLOATS = 5  # x, y, z, intensity, ring
ABOVE_GROUND = (0.3, 3.0)  # m in the ego's frame: returns below are road, above are bridges and branches


def nuscenes_drives(tables: Tables, *, reference: str = REFERENCE, points: bool = True) -> Iterator[Drive]:
    """One drive a scene.

    Args:
        tables: From `read_tables`.
        reference: The channel whose key frames give the ego's pose.
        points: Whether to read point clouds; without the files there is no `lidar_hit`.

    Raises:
        DataError: tokens that lead nowhere, a sample without the reference channel, a damaged point cloud.
    """
    classes = sorted(str(row["name"]) for row in tables.records["category"].values())
    for scene in tables.scenes():
        samples = list(tables.samples(scene))
        data = [_reference(tables, sample, reference) for sample in samples]
        poses = [tables.get("ego_pose", each["ego_pose_token"]) for each in data]
        boxes = [_boxes(tables, sample, pose, classes) for sample, pose in zip(samples, poses, strict=True)]
        arrays: Arrays = {**_padded(boxes), "occupancy": _occupancy(boxes, classes), "ego_motion": _motion(poses),
                          "time_us": np.array([sample["timestamp"] for sample in samples], np.int64)}
        if points and all((tables.root / each["filename"]).is_file() for each in data):
            arrays["lidar_hit"] = np.stack([_hits(tables, each) for each in data])
        yield Drive(safe_id(str(scene["name"])), arrays, _metadata(tables, scene, data[0], classes))


def _reference(tables: Tables, sample: Record, channel: str) -> Record:
    found = tables.key_frames.get(sample["token"], {})
    if channel not in found:
        raise DataError(f"a sample has no key frame of {channel}", where=tables.root / tables.version,
                        found=", ".join(sorted(found)) or "none")
    return found[channel]


def _boxes(tables: Tables, sample: Record, pose: Record, classes: Sequence[str]) -> tuple[Array, Array]:
    """Boxes (N, 7) in the ego's frame and their classes (N,)."""
    rows, kinds = [], []
    turn_33 = rotation(pose["rotation"]).T
    for annotation in tables.annotations.get(sample["token"], []):
        centre = turn_33 @ (np.array(annotation["translation"], float) - np.array(pose["translation"], float))
        own_33 = turn_33 @ rotation(annotation["rotation"])
        width, length, height = annotation["size"]  # in this order (docs/schema_nuscenes.md)
        rows.append([*centre, length, width, height, np.arctan2(own_33[1, 0], own_33[0, 0])])
        kinds.append(classes.index(tables.category(annotation)))
    return np.array(rows, np.float32).reshape(-1, 7), np.array(kinds, np.int64)


def rotation(quaternion: Sequence[float]) -> Array:
    """The matrix (3, 3) of a quaternion w, x, y, z, which need not be of unit length.

    Raises:
        DataError: it is zero or not finite.
    """
    values = np.asarray(quaternion, np.float64)
    norm = np.linalg.norm(values)
    if values.shape != (4,) or not np.isfinite(norm) or norm == 0:
        raise DataError("is no rotation", where="quaternion", found=quaternion)
    w, x, y, z = values / norm
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ])


def _padded(boxes: Sequence[tuple[Array, Array]]) -> Arrays:
    most = max(1, *(len(kinds) for _, kinds in boxes))
    box_TN7 = np.zeros((len(boxes), most, 7), np.float32)
    class_TN = np.full((len(boxes), most), -1, np.int64)
    for t, (rows, kinds) in enumerate(boxes):
        box_TN7[t, : len(rows)], class_TN[t, : len(kinds)] = rows, kinds
    return {"boxes": box_TN7, "box_class": class_TN}


def _occupancy(boxes: Sequence[tuple[Array, Array]], classes: Sequence[str]) -> Array:
    """Packed planes (T, 512) of all vehicles."""
    vehicle = np.array([name.startswith(VEHICLES) for name in classes])
    chosen = [rows[vehicle[kinds]][:, [0, 1, 6, 3, 4]] for rows, kinds in boxes]
    box_TM5 = np.full((len(chosen), max(1, *map(len, chosen)), 5), np.nan)
    for t, rows in enumerate(chosen):
        box_TM5[t, : len(rows)] = rows
    return np.packbits(draw_boxes(box_TM5).reshape(len(chosen), -1), axis=1)


def _motion(poses: Sequence[Record]) -> Array:
    """float32 (T, 3): metres ahead and left and radians to the left since the frame before, zeros first."""
    motion_T3 = np.zeros((len(poses), 3), np.float32)
    for t in range(1, len(poses)):
        before_33 = rotation(poses[t - 1]["rotation"]).T
        moved = before_33 @ (np.array(poses[t]["translation"], float) - np.array(poses[t - 1]["translation"], float))
        turned_33 = before_33 @ rotation(poses[t]["rotation"])
        motion_T3[t] = (moved[0], moved[1], np.arctan2(turned_33[1, 0], turned_33[0, 0]))
    return motion_T3


def _hits(tables: Tables, data: Record) -> Array:
    """One packed plane (512,) of the cells that a point cloud touches above the ground."""
    path = tables.root / data["filename"]
    require_inside(tables.root, path)
    flat = np.fromfile(path, np.float32)
    if len(flat) % POINT_FLOATS:
        raise DataError("is no point cloud of 5 floats a point", where=path, found=f"{flat.nbytes} bytes")
    sensor = tables.get("calibrated_sensor", data["calibrated_sensor_token"])
    point_P3 = flat.reshape(-1, POINT_FLOATS)[:, :3] @ rotation(sensor["rotation"]).T + np.array(sensor["translation"])
    return np.asarray(np.packbits(cells_of(point_P3[np.isfinite(point_P3).all(axis=1)]).reshape(-1)))


def cells_of(point_P3: Array) -> Array:
    """Bool (64, 64): cells with a point between 0.3 and 3 m above the ego's ground; row 0 ahead, column 0 left."""
    low, high = ABOVE_GROUND
    keep_P = (point_P3[:, 2] > low) & (point_P3[:, 2] < high)
    return np.asarray(draw_points(point_P3[None, :, :2], keep_P[None])[0])


def _metadata(tables: Tables, scene: Record, first: Record, classes: Sequence[str]) -> dict[str, Any]:
    log = tables.get("log", scene["log_token"])
    maps = [row for row in tables.records["map"].values() if log["token"] in row.get("log_tokens", ())]
    place, recording = str(log["location"]), str(log["logfile"])
    return {
        "recording": recording, "first_frame": _first_frame(tables, scene), "frames_per_second": 2,
        "date": str(log["date_captured"]), "place": place, "route": f"{place}-{recording}",
        "sensor_rig": str(log["vehicle"]), "rig": rig_of(tables, scene), "classes": list(classes),
        "map_version": str(maps[0]["token"]) if maps else "none", "nuscenes_version": tables.version,
        "description": str(scene.get("description", "")),
    }


def _first_frame(tables: Tables, scene: Record) -> int:
    """Key frames since the first one of the log: scenes of one log are parts of one recording."""
    def start(one: Record) -> int:
        return int(tables.get("sample", one["first_sample_token"])["timestamp"])

    together = [one for one in tables.records["scene"].values() if one["log_token"] == scene["log_token"]]
    return round((start(scene) - min(map(start, together))) / 500_000)


def rig_of(tables: Tables, scene: Record) -> dict[str, Any]:
    """Where each sensor sits: channel → modality, translation (m), rotation (w, x, y, z), camera matrix."""
    found = {}
    for channel, data in sorted(tables.key_frames.get(scene["first_sample_token"], {}).items()):
        sensor = tables.get("calibrated_sensor", data["calibrated_sensor_token"])
        found[channel] = {"modality": tables.get("sensor", sensor["sensor_token"])["modality"],
                          "translation": sensor["translation"], "rotation": sensor["rotation"],
                          "camera_matrix": sensor.get("camera_intrinsic") or None}
    return found



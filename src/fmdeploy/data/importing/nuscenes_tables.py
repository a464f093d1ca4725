"""nuScenes tables (`v1.0-*`, 13 JSON files that point at each other by token), read and checked.

Format: Caesar et al., arXiv:1903.11027, and docs/schema_nuscenes.md of nuscenes-devkit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmdeploy.data.importing.drives import read_json
from fmdeploy.errors import DataError

TABLES = ("attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
          "sample_annotation", "sample_data", "scene", "sensor", "visibility")
Record = dict[str, Any]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any) -> bool:
    return isinstance(value, int)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _numbers(count: int) -> Callable[[Any], bool]:
    return lambda value: (isinstance(value, list) and len(value) == count
                          and all(isinstance(x, (int, float)) and math.isfinite(x) for x in value))


FIELDS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "calibrated_sensor": {"sensor_token": _text, "translation": _numbers(3), "rotation": _numbers(4)},
    "category": {"name": _text},
    "ego_pose": {"translation": _numbers(3), "rotation": _numbers(4)},
    "instance": {"category_token": _text},
    "log": dict.fromkeys(("logfile", "vehicle", "date_captured", "location"), _text),
    "map": {"log_tokens": _names},
    "sample": {"timestamp": _whole, "next": _text},
    "sample_annotation": {"sample_token": _text, "instance_token": _text, "translation": _numbers(3),
                          "size": _numbers(3), "rotation": _numbers(4)},
    "sample_data": {"sample_token": _text, "ego_pose_token": _text, "calibrated_sensor_token": _text,
                    "is_key_frame": _flag, "filename": _text},
    "scene": {"name": _text, "log_token": _text, "first_sample_token": _text, "nbr_samples": _whole},
    "sensor": {"channel": _text, "modality": _text},
}
"""Table → what the import reads of each record, and what it must be."""


@dataclass(frozen=True)
class Tables:
    """All tables of one version, by token.

    Attributes:
        root: The folder with `v1.0-*`, `samples`, `maps`.
        version: Such as `v1.0-mini`.
        records: Table → token → record.
        annotations: Sample token → its annotations.
        key_frames: Sample token → channel → its key frame's sample_data.
    """

    root: Path
    version: str
    records: Mapping[str, Mapping[str, Record]]
    annotations: Mapping[str, list[Record]]
    key_frames: Mapping[str, Mapping[str, Record]]

    def get(self, table: str, token: str) -> Record:
        """One record.

        Raises:
            DataError: the token is nowhere.
        """
        try:
            return self.records[table][token]
        except KeyError:
            raise DataError(f"the table {table} lacks the token {token!r}", where=self.root / self.version) from None

    def scenes(self) -> list[Record]:
        """All scenes, by name."""
        return sorted(self.records["scene"].values(), key=lambda scene: str(scene["name"]))

    def samples(self, scene: Record) -> Iterator[Record]:
        """The samples of a scene in time.

        Raises:
            DataError: there are none, they do not form one chain of `nbr_samples`, or time runs backwards.
        """
        token, count, before = scene["first_sample_token"], 0, -1
        while token:
            sample = self.get("sample", token)
            count += 1
            if count > int(scene["nbr_samples"]) or int(sample["timestamp"]) <= before:
                raise DataError(f"the samples of {scene['name']} do not form a chain in time",
                                where=self.root / self.version, expected=f"{scene['nbr_samples']} samples")
            yield sample
            token, before = sample["next"], int(sample["timestamp"])
        if not count or count != int(scene["nbr_samples"]):
            raise DataError(f"{scene['name']} has another number of samples", where=self.root / self.version,
                            expected=scene["nbr_samples"], found=count)

    def category(self, annotation: Record) -> str:
        """Name of an annotation's category, such as `vehicle.car`."""
        instance = self.get("instance", annotation["instance_token"])
        return str(self.get("category", instance["category_token"])["name"])

    def channel(self, data: Record) -> str:
        """Name of the sensor that a sample_data is of, such as `LIDAR_TOP`."""
        sensor = self.get("calibrated_sensor", data["calibrated_sensor_token"])["sensor_token"]
        return str(self.get("sensor", sensor)["channel"])


def read_tables(root: Path, version: str | None = None) -> Tables:
    """Read all tables of `version`, or of the only one there is.

    Raises:
        DataError: there is none or more than one, a table is missing, or its records lack what is read of them.
    """
    chosen = version or _only_version(root)
    records = {name: _table(root / chosen / f"{name}.json") for name in TABLES}
    annotations: dict[str, list[Record]] = defaultdict(list)
    for annotation in records["sample_annotation"].values():
        annotations[annotation["sample_token"]].append(annotation)
    tables = Tables(root, chosen, records, annotations, defaultdict(dict))
    for data in records["sample_data"].values():
        if data["is_key_frame"]:
            tables.key_frames[data["sample_token"]][tables.channel(data)] = data  # type: ignore[index]
    return tables


def _only_version(root: Path) -> str:
    found = sorted(path.name for path in root.glob("v1.0-*") if path.is_dir())
    if len(found) != 1:
        raise DataError("holds no nuScenes tables" if not found else "holds more than one version", where=root,
                        expected="one folder v1.0-*", found=", ".join(found) or "none",
                        fix="Name it with --nuscenes-version" if found else "")
    return found[0]


def _table(path: Path) -> dict[str, Record]:
    if not path.is_file():
        raise DataError("a table is missing", where=path, expected=", ".join(TABLES))
    content = read_json(path.read_bytes(), path)
    if not isinstance(content, list) or not all(isinstance(row, dict) and "token" in row for row in content):
        raise DataError("is no table of records with tokens", where=path)
    for row in content:
        for name, fits in FIELDS.get(path.stem, {}).items():
            if name not in row or not fits(row[name]):
                raise DataError(f"the record {str(row['token'])[:40]} has no usable {name!r}", where=path,
                                found=repr(row[name])[:40] if name in row else "nothing")
    return {str(row["token"]): row for row in content}

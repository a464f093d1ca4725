"""nuScenes tables (`v1.0-*`, 13 JSON files that point at each other by token), read and checked.

Format: Caesar et al., arXiv:1903.11027, and docs/schema_nuscenes.md of nuscenes-devkit.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmdeploy.errors import DataError

TABLES = ("attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
          "sample_annotation", "sample_data", "scene", "sensor", "visibility")
Record = dict[str, Any]


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
            DataError: they do not form one chain of `nbr_samples`, or time runs backwards.
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
        if count != int(scene["nbr_samples"]):
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
        DataError: there is none or more than one, a table is missing or no list of records with tokens.
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
                        fix="Name it with --version" if found else "")
    return found[0]


def _table(path: Path) -> dict[str, Record]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError("a table is missing", where=path, expected=", ".join(TABLES)) from error
    except (OSError, ValueError) as error:
        raise DataError(f"is not JSON: {error}", where=path) from error
    if not isinstance(content, list) or not all(isinstance(row, dict) and "token" in row for row in content):
        raise DataError("is no table of records with tokens", where=path)
    return {str(row["token"]): row for row in content}

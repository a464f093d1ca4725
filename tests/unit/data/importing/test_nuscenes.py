"""Our reading of the nuScenes format against that of nuscenes-devkit, on a small set in that format."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.data.audit import audit
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.importing import stage
from fmdeploy.data.importing.nuscenes_tables import Tables, read_tables
from fmdeploy.data.importing.stage import import_data
from fmdeploy.errors import DataError, LeakageError
from support.nuscenes_tables import write_nuscenes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the devkit is written for older versions of what it imports
    from nuscenes.nuscenes import NuScenes
    from pyquaternion import Quaternion


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nuscenes(tmp_path_factory.mktemp("nuscenes") / "data")


@pytest.fixture(scope="module")
def devkit(source: Path) -> Any:
    return NuScenes("v1.0-mini", str(source), verbose=False)


@pytest.fixture(scope="module")
def imported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("imported") / "data"
    import_data(source=source, format="nuscenes", out=out, val=0, test=0.5)
    return open_dataset(out)


def test_the_tables_are_read_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the digest and for the drives alike: those of the full set take a minute to parse."""
    read: list[Path] = []

    def spied(root: Path, version: str | None) -> Tables:
        read.append(root)
        return read_tables(root, version)

    monkeypatch.setattr(stage, "read_tables", spied)
    import_data(source=source, format="nuscenes", out=tmp_path / "out", val=0, test=0.5)
    assert read == [source]


def key_frames(devkit: Any, scene: Any) -> list[Any]:
    found, token = [], scene["first_sample_token"]
    while token:
        sample = devkit.get("sample", token)
        found.append(devkit.get("sample_data", sample["data"]["LIDAR_TOP"]))
        token = sample["next"]
    return found


def ego_boxes(devkit: Any, data: Any) -> list[Any]:
    """The devkit's boxes, moved as its own get_sample_data moves them, as far as the ego."""
    pose, boxes = devkit.get("ego_pose", data["ego_pose_token"]), devkit.get_boxes(data["token"])
    for box in boxes:
        box.translate(-np.array(pose["translation"]))
        box.rotate(Quaternion(pose["rotation"]).inverse)
    return list(boxes)


def test_boxes_and_classes_are_those_of_the_devkit(devkit: Any, imported: Dataset) -> None:
    compared = 0
    for scene, sequence in zip(devkit.scene, imported.sequences, strict=True):
        assert sequence.id == scene["name"]
        arrays, classes = imported.arrays(sequence), sequence.metadata["classes"]
        for t, data in enumerate(key_frames(devkit, scene)):
            boxes = ego_boxes(devkit, data)
            assert (arrays["box_class"][t] >= 0).sum() == len(boxes)
            for box, row, kind in zip(boxes, arrays["boxes"][t], arrays["box_class"][t], strict=False):
                assert classes[kind] == box.name
                np.testing.assert_allclose(row[:3], box.center, atol=1e-3)
                np.testing.assert_allclose(row[[4, 3, 5]], box.wlh, atol=1e-5)
                turned = (row[6] - box.orientation.yaw_pitch_roll[0] + np.pi) % (2 * np.pi) - np.pi
                assert abs(turned) < 1e-3
                compared += 1
            assert arrays["time_us"][t] == data["timestamp"]
    assert compared == 3 * 5 * 12


def test_the_ego_moves_as_its_poses_say(devkit: Any, imported: Dataset) -> None:
    for scene, sequence in zip(devkit.scene, imported.sequences, strict=True):
        motion_T3 = imported.arrays(sequence)["ego_motion"]
        poses = [devkit.get("ego_pose", data["ego_pose_token"]) for data in key_frames(devkit, scene)]
        assert not motion_T3[0].any()
        for t in range(1, len(poses)):
            before = Quaternion(poses[t - 1]["rotation"]).inverse
            moved = before.rotate(np.array(poses[t]["translation"]) - np.array(poses[t - 1]["translation"]))
            np.testing.assert_allclose(motion_T3[t, :2], moved[:2], atol=1e-4)
            turned = (before * Quaternion(poses[t]["rotation"])).yaw_pitch_roll[0]
            assert motion_T3[t, 2] == pytest.approx(turned, abs=1e-4)


def test_occupancy_is_where_the_devkits_vehicles_are(devkit: Any, imported: Dataset) -> None:
    """A cell is occupied if and only if its centre lies in a vehicle's corners as the devkit gives them."""
    centre_G = 31.5 - np.arange(64)
    for scene, sequence in zip(devkit.scene, imported.sequences, strict=True):
        grid_TGG = np.unpackbits(imported.arrays(sequence)["occupancy"], axis=1).reshape(-1, 64, 64)
        assert grid_TGG.any()
        for t, data in enumerate(key_frames(devkit, scene)):
            wanted_GG = np.zeros((64, 64), bool)
            for box in ego_boxes(devkit, data):
                if box.name.startswith("vehicle."):
                    corner_24 = box.bottom_corners()[:2]
                    wanted_GG |= inside(corner_24, centre_G)
            assert (grid_TGG[t].astype(bool) != wanted_GG).sum() <= 4  # the corners of a tilted box, seen from above


def inside(corner_24: Any, centre_G: Any) -> Any:
    x_GG, y_GG = np.meshgrid(centre_G, centre_G, indexing="ij")
    found = np.ones((64, 64), bool)
    area = 0.5 * sum(corner_24[0, k] * corner_24[1, k - 3] - corner_24[0, k - 3] * corner_24[1, k] for k in range(4))
    for k in range(4):
        (ax, ay), (bx, by) = corner_24[:, k], corner_24[:, (k + 1) % 4]
        found &= ((bx - ax) * (y_GG - ay) - (by - ay) * (x_GG - ax)) * np.sign(area) >= 0
    return found


def test_points_land_where_the_devkits_do(devkit: Any, imported: Dataset, source: Path) -> None:
    from nuscenes.utils.data_classes import LidarPointCloud

    sequence = imported.sequences[0]
    data = key_frames(devkit, devkit.scene[0])[0]
    cloud = LidarPointCloud.from_file(str(source / data["filename"]))
    sensor = devkit.get("calibrated_sensor", data["calibrated_sensor_token"])
    cloud.rotate(Quaternion(sensor["rotation"]).rotation_matrix)
    cloud.translate(np.array(sensor["translation"]))
    x, y, z = cloud.points[:3]
    kept = (z > 0.3) & (z < 3.0) & (np.abs(x) < 32) & (np.abs(y) < 32)
    wanted = np.zeros((64, 64), bool)
    wanted[np.floor(32 - x[kept]).astype(int), np.floor(32 - y[kept]).astype(int)] = True
    found = np.unpackbits(imported.arrays(sequence)["lidar_hit"][0]).reshape(64, 64).astype(bool)
    assert found.sum() > 30
    assert (found != wanted).sum() == 0


def test_metadata_says_place_day_map_and_rig(imported: Dataset, devkit: Any) -> None:
    metadata = imported.sequences[2].metadata
    assert (metadata["place"], metadata["date"], metadata["sensor_rig"]) == ("boston-seaport", "2018-07-21", "n001")
    assert metadata["map_version"] == devkit.map[0]["token"]
    rig = metadata["rig"]
    assert rig["CAM_FRONT"]["camera_matrix"][0][0] == 1266.4
    assert rig["LIDAR_TOP"]["translation"] == [0.9, 0.0, 1.8]
    assert [s.metadata["first_frame"] for s in imported.sequences] == [0, 40, 0]


def test_scenes_of_one_log_stay_together(source: Path, imported: Dataset, tmp_path: Path) -> None:
    assert {len(ids) for ids in imported.splits.values()} == {0, 1, 2}
    assert audit(data=imported.artifact.root).data == []
    with pytest.raises(LeakageError, match="same route same day"):
        import_data(source=source, format="nuscenes", out=tmp_path / "x", val=0, test=0.34, by="sequence")
    assert not (tmp_path / "x").exists()


def test_the_digest_covers_the_source(source: Path, imported: Dataset, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    options: dict[str, Any] = {"format": "nuscenes", "val": 0, "test": 0.5}
    assert import_data(source=copy, out=tmp_path / "same", **options).digest == imported.digest
    table = copy / "v1.0-mini" / "log.json"
    table.write_text(table.read_text().replace("boston", "austin"))
    assert import_data(source=copy, out=tmp_path / "other", **options).digest != imported.digest
    without = import_data(source=copy, out=tmp_path / "tables", points=False, **options)
    assert "lidar_hit" not in open_dataset(without.root).arrays(open_dataset(without.root).sequences[0])


def _lose_table(folder: Path) -> None:
    (folder / "ego_pose.json").unlink()


def _edit(name: str, change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        rows = json.loads((folder / f"{name}.json").read_text())
        change(rows)
        (folder / f"{name}.json").write_text(json.dumps(rows))

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a table is missing": (_lose_table, "ego_pose.json: a table is missing"),
    "a table is no JSON": (lambda folder: (folder / "log.json").write_text("["), "log.json: is not JSON"),
    "a token leads nowhere": (_edit("sample_data", lambda rows: rows[0].update(ego_pose_token="x")), "lacks the token 'x'"),
    "samples in a ring": (_edit("sample", lambda rows: rows[4].update(next=rows[0]["token"])), "do not form a chain"),
    "samples are lost": (_edit("sample", lambda rows: rows[1].update(next="")), "another number of samples"),
    "no key frame": (_edit("sample_data", lambda rows: [row.update(is_key_frame=False) for row in rows]),
                     "no key frame of LIDAR_TOP"),
    "no rotation": (_edit("ego_pose", lambda rows: rows[0].update(rotation=[0, 0, 0, 0])), "is no rotation"),
    "out of the folder": (_edit("sample_data", lambda rows: rows[0].update(filename="../../etc/passwd")), "LIDAR_TOP|leads out|not a regular"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tables_are_told_and_nothing_is_written(source: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    hurt, message = DAMAGE[damage]
    hurt(copy / "v1.0-mini")
    if damage == "out of the folder":
        (tmp_path.parent / "etc").mkdir(exist_ok=True)
        (tmp_path.parent / "etc" / "passwd").write_bytes(b"\0" * 20)
    with pytest.raises(DataError, match=message):
        import_data(source=copy, format="nuscenes", out=tmp_path / "out", val=0, test=0.5)
    assert not (tmp_path / "out").exists()


def test_several_versions_must_be_named(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    shutil.copytree(source / "v1.0-mini", copy / "v1.0-test")
    with pytest.raises(DataError, match="more than one version.*v1.0-mini, v1.0-test"):
        import_data(source=copy, format="nuscenes", out=tmp_path / "out", val=0, test=0.5)
    with pytest.raises(DataError, match="holds no nuScenes tables"):
        import_data(source=tmp_path, format="nuscenes", out=tmp_path / "out")
    made = import_data(source=copy, format="nuscenes", out=tmp_path / "out", val=0, test=0.5, nuscenes_version="v1.0-test")
    assert open_dataset(made.root).sequences[0].metadata["nuscenes_version"] == "v1.0-test"

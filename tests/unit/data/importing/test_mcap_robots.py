"""Logs as robots write them: ROS 2 and Foxglove's protobuf, through the command line, with all that is broken in them."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from mcap.writer import Writer
from PIL import Image

from fmdeploy.cli import group
from fmdeploy.data.format import open_dataset
from fmdeploy.data.importing.mcap_images import LAYOUTS
from fmdeploy.data.importing.stage import import_data
from fmdeploy.data.split import split
from fmdeploy.errors import DataError, MissingDependencyError
from support.robotlogs import (
    START,
    Message,
    cloud,
    foxglove,
    foxglove_cloud,
    image,
    write_protobuf,
    write_ros2,
)

IMAGE, PACKED, POINTS = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/PointCloud2"
ODOMETRY, IMU, FIX = "nav_msgs/msg/Odometry", "sensor_msgs/msg/Imu", "sensor_msgs/msg/NavSatFix"
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
ALPHA = np.dstack([RGB, np.full((6, 8), 9, np.uint8)])
DEEP = RNG.integers(0, 65536, (6, 8), dtype=np.uint16)
RANGE = np.dtype({"names": ["x", "y", "z", "intensity", "ring", "t"], "formats": ["f4", "f4", "f8", "u1", "u2", "i4"],
                  "offsets": [0, 4, 8, 20, 22, 24], "itemsize": 32})


def load(path: Path, out: Path, *topics: str, **options: Any) -> dict[str, Any]:
    data = open_dataset(import_data(source=path, format="mcap", out=out, topic=topics, val=0, test=0, **options).root)
    (sequence,) = data.sequences
    return {**data.arrays(sequence), "metadata": sequence.metadata}


def points(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    rng, made = np.random.default_rng(seed), np.zeros(count, RANGE)
    for name, low, high in (("x", -50, 50), ("y", -50, 50), ("z", -3, 3), ("intensity", 0, 255), ("ring", 0, 3000), ("t", -9, 9)):
        made[name] = rng.uniform(low, high, count)
    return made


def columns(made: np.ndarray[Any, Any], *names: str) -> np.ndarray[Any, Any]:
    return np.stack([made[name].astype(np.float32) for name in names], axis=1)


def encoded(kind: str, pixels: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def test_a_drive_of_ros_2_comes_in_by_the_command_line(tmp_path: Path) -> None:
    messages: list[Message] = []
    for k in range(5):
        s = 0.2 * k
        messages += [
            ("/camera", s, IMAGE, image(RGB, "bgr8", padding=5)), ("/packed", s, PACKED, {"format": "png", "data": encoded("PNG", RGB)}),
            ("/lidar", s, POINTS, cloud(points(10 + k, k))),
            ("/odom", s, ODOMETRY, {"pose": {"pose": {"position": {"x": 3.0 * k}}, "covariance": list(range(36))},
                                    "twist": {"twist": {"linear": {"x": 15.0 + k}}}}),
            ("/imu", s, IMU, {"angular_velocity": {"z": -0.5 * k}, "orientation_covariance": [0.25] * 9}),
        ]
    path = write_ros2(tmp_path / "drive.mcap", messages)
    topics = ("front=/camera", "packed=/packed", "lidar=/lidar", "x=/odom:pose.pose.position.x", "speed=/odom:twist.twist.linear.x",
              "cov=/odom:pose.covariance.7", "yaw_rate=/imu:angular_velocity.z", "trust=/imu:orientation_covariance")
    arguments = [part for topic in topics for part in ("--topic", topic)]
    done = CliRunner().invoke(group, ["data", "import", str(path), "--format", "mcap", "--out", str(tmp_path / "out"),
                                      "--val", "0", "--test", "0", *arguments])
    assert done.exit_code == 0, done.output
    data = open_dataset(tmp_path / "out")
    (sequence,) = data.sequences
    found = data.arrays(sequence)
    assert found["time_ns"].tolist() == [START + k * 200_000_000 for k in range(5)]
    np.testing.assert_allclose(found["front"][2], RGB[..., ::-1].transpose(2, 0, 1) / 255, atol=1e-6)
    np.testing.assert_allclose(found["packed"][2], RGB.transpose(2, 0, 1) / 255, atol=1e-6)
    assert found["x"].tolist() == [0, 3, 6, 9, 12]
    assert found["speed"].tolist() == [15, 16, 17, 18, 19]
    assert found["cov"].tolist() == [7] * 5
    assert found["yaw_rate"].tolist() == [0, -0.5, -1, -1.5, -2]
    assert found["trust"].shape == (5, 9)
    assert found["lidar"].shape == (5, 14, 4)
    assert found["lidar_count"].tolist() == [10, 11, 12, 13, 14]
    assert sequence.metadata["lidar_columns"] == ["x", "y", "z", "intensity"]
    for k in range(5):
        np.testing.assert_array_equal(found["lidar"][k, : 10 + k], columns(points(10 + k, k), "x", "y", "z", "intensity"))
        assert not found["lidar"][k, 10 + k :].any()


WANTED: dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {
    "rgb8": (RGB, RGB.transpose(2, 0, 1) / 255), "bgr8": (RGB, RGB[..., ::-1].transpose(2, 0, 1) / 255),
    "rgba8": (ALPHA, RGB.transpose(2, 0, 1) / 255), "bgra8": (ALPHA, RGB[..., ::-1].transpose(2, 0, 1) / 255),
    "mono8": (RGB[..., 0], np.stack([RGB[..., 0]] * 3) / 255), "8UC1": (RGB[..., 0], np.stack([RGB[..., 0]] * 3) / 255),
    "mono16": (DEEP, np.stack([DEEP] * 3) / 65535), "16UC1": (DEEP, DEEP[None]), "32FC1": (DEEP.astype(np.float32) / 7, DEEP[None] / 7),
}


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("encoding", LAYOUTS)
def test_raw_images_are_read_whatever_their_rows_and_bytes(tmp_path: Path, encoding: str, big: bool) -> None:
    pixels, wanted = WANTED[encoding]
    path = write_ros2(tmp_path / "a.mcap", [("/cam", 0, IMAGE, image(pixels, encoding, padding=3, big=big))])
    found = load(path, tmp_path / "out", "front=/cam", "same=/cam:data")
    assert found["front"].dtype == np.float32
    np.testing.assert_allclose(found["front"][0], wanted, rtol=1e-5, atol=1e-6)
    assert (found["same"] == found["front"]).all()


def test_depth_keeps_its_numbers_when_it_is_resized_and_says_no_return_with_zero(tmp_path: Path) -> None:
    depth = np.repeat(np.repeat(np.array([[2.5, np.nan], [np.inf, 40.0]], np.float32), 4, axis=0), 6, axis=1)
    path = write_ros2(tmp_path / "a.mcap", [("/depth", 0, IMAGE, image(depth, "32FC1")), ("/cam", 0, IMAGE, image(RGB, "rgb8"))])
    found = load(path, tmp_path / "out", "depth=/depth", "front=/cam", height=4, width=6)
    assert found["depth"].shape == (1, 1, 4, 6)
    assert found["depth"][0, 0].tolist() == [[2.5] * 3 + [0] * 3] * 2 + [[0] * 3 + [40] * 3] * 2
    assert found["front"].shape == (1, 3, 4, 6)
    assert load(path, tmp_path / "grey", "front=/cam", channels=1)["front"].shape == (1, 1, 6, 8)


@pytest.mark.parametrize("big", [False, True])
def test_clouds_in_rows_with_gaps_and_without_returns(tmp_path: Path, big: bool) -> None:
    made = points(12)
    made["x"][3], made["z"][7] = np.nan, np.inf
    path = write_ros2(tmp_path / "a.mcap", [("/lidar", 0, POINTS, cloud(made, rows=3, padding=11, big=big))])
    found = load(path, tmp_path / "out", "lidar=/lidar", "rest=/lidar:ring,t,z", "rows=/lidar:height")
    kept = np.delete(made, [3, 7])
    assert found["lidar_count"].tolist() == [10]
    np.testing.assert_array_equal(found["lidar"][0], columns(kept, "x", "y", "z", "intensity"))
    np.testing.assert_array_equal(found["rest"][0], columns(np.delete(made, [7]), "ring", "t", "z"))
    assert found["metadata"]["rest_columns"] == ["ring", "t", "z"]
    assert found["rows"].tolist() == [3]


def test_clouds_of_a_fixed_size_are_thinned_evenly_or_padded(tmp_path: Path) -> None:
    messages = [("/lidar", 0.2 * k, POINTS, cloud(points(count))) for k, count in enumerate((0, 3, 8, 20))]
    found = load(write_ros2(tmp_path / "a.mcap", messages), tmp_path / "out", "lidar=/lidar:x", cloud_points=8)
    assert found["lidar"].shape == (4, 8, 1)
    assert found["lidar_count"].tolist() == [0, 3, 8, 8]
    np.testing.assert_array_equal(found["lidar"][3, :, 0], points(20)["x"][[0, 2, 5, 7, 10, 12, 15, 17]])


def test_foxglove_in_protobuf(tmp_path: Path) -> None:
    raw = foxglove("RawImage")(width=8, height=6, encoding="16UC1", step=18, data=np.pad(DEEP, ((0, 0), (0, 1))).tobytes())
    packed = foxglove("CompressedImage")(format="jpeg", data=encoded("JPEG", np.full((6, 8, 3), 128, np.uint8)))
    place = foxglove("LocationFix")(latitude=48.1375, longitude=11.575)
    made = [("/raw", raw), ("/packed", packed), ("/lidar", foxglove_cloud(points(9))), ("/gps", place)]
    path = write_protobuf(tmp_path / "a.mcap", [(topic, s, content) for s in (0, 0.2) for topic, content in made])
    found = load(path, tmp_path / "out", "depth=/raw", "front=/packed", "lidar=/lidar", "latitude=/gps:latitude",
                 "longitude=/gps:longitude", "stride=/lidar:point_stride", "second=/lidar:fields.1.offset")
    assert (found["depth"] == DEEP).all()
    np.testing.assert_allclose(found["front"], 128 / 255, atol=1e-3)
    np.testing.assert_array_equal(found["lidar"][1], columns(points(9), "x", "y", "z", "intensity"))
    assert (found["stride"].tolist(), found["second"].tolist()) == ([32, 32], [4, 4])
    assert found["metadata"]["position"] == pytest.approx([48.1375, 11.575], abs=1e-5)


def write_json(path: Path, content: Any) -> Path:
    with path.open("wb") as stream:
        writer = Writer(stream)
        writer.start()
        channel = writer.register_channel("/t", "json", writer.register_schema("x", "jsonschema", b"{}"))
        writer.add_message(channel, START, json.dumps(content).encode(), START)
        writer.finish()  # type: ignore[no-untyped-call]
    return path


def test_a_raw_image_in_json_is_one_too(tmp_path: Path) -> None:
    plain = image(RGB, "rgb8")
    for name, data in (("base64", base64.b64encode(plain["data"]).decode()), ("list", list(plain["data"]))):
        found = load(write_json(tmp_path / f"{name}.mcap", {**plain, "data": data}), tmp_path / name, "front=/t")
        np.testing.assert_allclose(found["front"][0], RGB.transpose(2, 0, 1) / 255, atol=1e-6)


IN_JSON: dict[str, Any] = {"fields": [{"name": n, "offset": k, "datatype": 2} for k, n in enumerate("xyz")], "data": "", "point_step": 3,
                           "height": 0, "width": 0, "row_step": 0}


@pytest.mark.parametrize(("values", "said"), [
    ({"fields": 3}, "no column 'x'"), ({"fields": [1, {"name": []}]}, "no column 'x'.*found None, "),
    ({"data": [1, 300, 2]}, "a field holds no bytes"), ({"data": 7}, "a field holds no bytes.*found 7"), ({"data": "?"}, "neither number"),
    ({"width": -1}, "'width' is no whole number"), ({"height": 2.5}, "'height' is no"), ({"row_step": 10**30}, "'row_step' is no"),
    ({"fields": [{"name": n, "offset": 0, "datatype": "f4"} for n in "xyz"]}, "'datatype' is no"),
    ({"encoding": ["rgb8"], "step": 3, "fields": None}, "encoding that is not read"),
])
def test_nonsense_in_json_is_one_line(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    """What CDR and protobuf rule out by their types."""
    with pytest.raises(DataError, match=rf"a\.mcap: /t at 2026-.*{said}"):
        load(write_json(tmp_path / "a.mcap", {**IN_JSON, **values}), tmp_path / "out", "a=/t")


@pytest.mark.parametrize("values", [{}, {"width": 2**30, "row_step": 3 * 2**30}, {"height": 2**32 - 1}])
def test_clouds_without_points_have_none(tmp_path: Path, values: dict[str, Any]) -> None:
    found = load(write_json(tmp_path / "a.mcap", {**IN_JSON, **values}), tmp_path / "out", "a=/t")
    assert (found["a"].shape, found["a_count"].tolist()) == ((1, 1, 3), [0])


def changed(made: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**made, **values}


CLOUD = cloud(points(12))
FIELDS = CLOUD["fields"]
BAD: dict[str, tuple[str, Any, str, str]] = {
    "encoding": (IMAGE, image(RGB, "bayer_rggb8"), "a=/t", "encoding that is not read.*expected rgb8, bgr8.*found 'bayer_rggb8'"),
    "short image": (IMAGE, changed(image(RGB, "rgb8"), data=b"abc"), "a=/t", "raw image's sizes and data.*3 bytes"),
    "wide image": (IMAGE, changed(image(RGB, "rgb8"), width=9), "a=/t", "raw image's sizes and data.*at least 27 a row"),
    "huge image": (IMAGE, changed(image(RGB, "rgb8"), width=2**32 - 1, height=2**32 - 1), "a=/t", "sizes and data"),
    "no pixels": (IMAGE, changed(image(RGB, "rgb8"), width=0, height=0, step=0, data=b""), "a=/t", "sizes and data"),
    "no jpeg": (PACKED, {"format": "jpeg", "data": encoded("JPEG", RGB)[:200]}, "a=/t", "cannot be read as an image"),
    "depth codec": (PACKED, {"format": "16UC1; compressedDepth png", "data": b"abc"}, "a=/t", "compressed depth image.*expected JPEG"),
    "short cloud": (POINTS, changed(CLOUD, data=CLOUD["data"][:-5]), "a=/t", "point cloud's sizes and data.*379 bytes"),
    "wide cloud": (POINTS, changed(CLOUD, width=13), "a=/t", "point cloud's sizes and data.*at least 416"),
    "no step": (POINTS, changed(CLOUD, point_step=0), "a=/t", "point cloud's sizes and data"),
    "no column": (POINTS, CLOUD, "a=/t:x,colour", "has no column 'colour'.*found x, y, z, intensity, ring, t"),
    "no columns": (POINTS, changed(CLOUD, fields=[]), "a=/t", "has no column 'x'"),
    "column outside": (POINTS, changed(CLOUD, fields=[changed(f, offset=30) for f in FIELDS]), "a=/t", "'x' of a point cloud does not fit"),
    "column type": (POINTS, changed(CLOUD, fields=[changed(f, datatype=9) for f in FIELDS]), "a=/t", "unknown type.*1 to 8, found 9"),
    "column of many": (POINTS, changed(CLOUD, fields=[changed(f, count=3) for f in FIELDS]), "a=/t", "'x' .* does not fit.*found 3 of 4"),
    "no field": (IMU, {}, "a=/t:angular_speed.z", "no field 'angular_speed.z'.*found header, orientation, .*angular_velocity"),
    "a message": (IMU, {}, "a=/t:angular_velocity", "no number and no list"),
    "infinite": (FIX, {"latitude": float("nan")}, "a=/t:latitude", "not finite"),
    "cut off": (IMU, b"\x00\x01\x00\x00" + bytes(30), "a=/t:angular_velocity.z", "a message cannot be decoded: unpack_from"),
    "no bytes": (IMU, b"", "a=/t:angular_velocity.z", "cannot be decoded: Invalid CDR data size"),
    "cut image": (IMAGE, b"\x00\x01\x00\x00" + bytes(12) + b"\x06\x00\x00\x00\x08\x00\x00\x00\x06\x00\x00\x00", "a=/t", "decoded|encoding"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_broken_is_one_line_with_file_topic_and_time(tmp_path: Path, case: str) -> None:
    kind, content, topic, said = BAD[case]
    path = write_ros2(tmp_path / "a.mcap", [("/t", 1.5, kind, content)])
    with pytest.raises(DataError, match=rf"a\.mcap: /t\S* at 2026-03-31T00:00:01\.500000Z: .*({said})") as caught:
        load(path, tmp_path / "out", topic)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_protobuf_that_is_broken_is_one_line(tmp_path: Path) -> None:
    torn = foxglove_cloud(points(5))
    torn.data = torn.data[:-1]
    with pytest.raises(DataError, match=r"a\.mcap: /t at 2026-.*expected a multiple of 32 bytes, found 159 bytes"):
        load(write_protobuf(tmp_path / "a.mcap", [("/t", 0, torn)]), tmp_path / "out", "a=/t")
    with pytest.raises(DataError, match="has no column 'w'"):
        load(write_protobuf(tmp_path / "a.mcap", [("/t", 0, foxglove_cloud(points(5)))]), tmp_path / "out", "a=/t:w")
    with pytest.raises(DataError, match="no field 'speed'.*found timestamp, latitude, longitude, altitude"):
        load(write_protobuf(tmp_path / "a.mcap", [("/t", 0, foxglove("LocationFix")())]), tmp_path / "out", "a=/t:speed")


@pytest.mark.parametrize(("encoding", "schema", "content", "said"), [
    ("cdr", ("ros2idl", b"struct"), b"abcd", "a schema that cannot be decoded .expected ros2msg, found ros2idl"),
    ("cdr", ("ros2msg", b"uint8 a b c"), b"abcd", "a message cannot be decoded"),
    ("protobuf", ("protobuf", b"\xff\xff"), b"abcd", "a message cannot be decoded"),
    ("protobuf", None, b"abcd", "a schema that cannot be decoded .expected protobuf, found none"),
    ("ros1", ("ros1msg", b""), b"abcd", "an encoding that cannot be decoded.*expected json, cdr, protobuf, found ros1"),
])
def test_schemas_that_are_not_read_are_told(tmp_path: Path, encoding: str, schema: tuple[str, bytes] | None, content: bytes, said: str) -> None:
    with (tmp_path / "a.mcap").open("wb") as stream:
        writer = Writer(stream)
        writer.start()
        number = 0 if schema is None else writer.register_schema("a/msg/B", *schema)
        writer.add_message(writer.register_channel("/t", encoding, number), START, content, START)
        writer.finish()  # type: ignore[no-untyped-call]
    with pytest.raises(DataError, match=rf"a\.mcap: /t at 2026-.*{said}"):
        load(tmp_path / "a.mcap", tmp_path / "out", "x=/t:a")


@pytest.mark.parametrize("package", ["mcap_ros2", "mcap_protobuf"])
def test_a_decoder_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    path = tmp_path / "a.mcap"
    if package == "mcap_ros2":
        write_ros2(path, [("/t", 0, FIX, {"latitude": 1.0})])
    else:
        write_protobuf(path, [("/t", 0, foxglove("LocationFix")(latitude=1.0))])
    for name in (package, f"{package}.decoder"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=rf"{package}.*pip install 'fmdeploy\[import\]'") as caught:
        load(path, tmp_path / "out", "x=/t:latitude")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_only_what_frames_show_is_decoded_and_held(tmp_path: Path) -> None:
    """Of a camera at 100 Hz, every twentieth image at 5 Hz: the others may even be broken."""
    messages = [("/cam", 0.01 * k, IMAGE, image(np.full((6, 8), k, np.uint8), "mono8") if k % 20 == 0 else b"\x00\x01\x00\x00") for k in range(101)]
    found = load(write_ros2(tmp_path / "a.mcap", messages), tmp_path / "out", "front=/cam", channels=1)
    np.testing.assert_allclose(found["front"].mean(axis=(1, 2, 3)) * 255, [0, 20, 40, 60, 80, 100], atol=1e-4)


def test_long_drives_are_cut_and_know_where_they_begin(tmp_path: Path) -> None:
    messages = [("/gps", 0.1 * k, FIX, {"latitude": 48.0 + k}) for k in range(31)]
    data = open_dataset(import_data(source=write_ros2(tmp_path / "a.mcap", messages), format="mcap", out=tmp_path / "out",
                                    topic=["latitude=/gps:latitude"], rate_hz=10, drive_s=1.2, val=0, test=0).root)
    assert [(s.id, s.frames, s.metadata["first_frame"]) for s in data.sequences] == [("a-000", 12, 0), ("a-001", 12, 12), ("a-002", 7, 24)]
    together = np.concatenate([data.arrays(sequence)["latitude"] for sequence in data.sequences])
    assert together.tolist() == [48.0 + k for k in range(31)]


def test_logs_with_a_receiver_divide_by_geography(tmp_path: Path) -> None:
    """Two logs in each of three towns."""
    (tmp_path / "logs").mkdir()
    for k in range(6):
        messages = [("/gps", 0.2 * t, FIX, {"latitude": 48.0 + k // 2, "longitude": 11.5 + 1e-4 * t}) for t in range(4)]
        write_ros2(tmp_path / "logs" / f"log{k}.mcap", messages)
    made = import_data(source=tmp_path / "logs", format="mcap", out=tmp_path / "out",
                       topic=["latitude=/gps:latitude", "longitude=/gps:longitude"], val=0.33, test=0.33)
    data = open_dataset(split(data=made.root, out=tmp_path / "split", by="geography", tile_m=5000, val=0.33, test=0.33).root)
    towns = {name: sorted({int(sequence[3]) // 2 for sequence in ids}) for name, ids in data.splits.items()}
    assert sorted(map(tuple, towns.values())) == [(0,), (1,), (2,)]
    assert all(len(ids) == 2 for ids in data.splits.values())


def test_a_cloud_keeps_the_name_of_its_count_to_itself(tmp_path: Path) -> None:
    path = write_ros2(tmp_path / "a.mcap", [("/lidar", 0, POINTS, CLOUD)])
    with pytest.raises(DataError, match="lidar_count is the number of points of lidar"):
        load(path, tmp_path / "out", "lidar=/lidar", "lidar_count=/lidar:width")

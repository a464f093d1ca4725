from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mcap.writer import CompressionType, Writer
from PIL import Image

from fmdeploy.data.format import open_dataset
from fmdeploy.data.importing.mcap import Topic
from fmdeploy.data.importing.stage import import_data
from fmdeploy.errors import ConfigError, DataError

START = 1_774_915_200_000_000_000  # 2026-03-31 in UTC
NS = 1_000_000_000
Message = tuple[str, float, Any]


def write_log(path: Path, messages: Sequence[Message], *, encoding: str = "json", metadata: dict[str, str] | None = None) -> Path:
    """A log with messages (topic, seconds, content)."""
    with path.open("wb") as stream:
        writer = Writer(stream, compression=CompressionType.ZSTD)
        writer.start()
        channels: dict[str, int] = {}
        for topic, seconds, content in messages:
            if topic not in channels:
                schema = writer.register_schema(topic, "jsonschema", b"{}")
                channels[topic] = writer.register_channel(topic, encoding, schema)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            writer.add_message(channels[topic], START + int(seconds * NS), data, START + int(seconds * NS))
        if metadata:
            writer.add_metadata("vehicle", metadata)
        writer.finish()  # type: ignore[no-untyped-call]
    return path


def odometry(seconds: float) -> Message:
    return "/odom", seconds, {"twist": {"linear": [seconds, 0.5]}, "stamp": seconds}


def jpeg(level: int) -> str:
    stream = io.BytesIO()
    Image.new("L", (8, 6), level).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def load(path: Path, out: Path, *topics: str, **options: Any) -> Any:
    data = open_dataset(import_data(source=path, format="mcap", out=out, topic=topics, val=0, test=0, **options).root)
    return data, [data.arrays(sequence) for sequence in data.sequences]


def test_frames_show_the_newest_message_and_nothing_of_the_future(tmp_path: Path) -> None:
    messages = [odometry(k * 0.1) for k in range(21)] + [("/cam", 0.05 + k * 0.5, {"data": jpeg(20 * k)}) for k in range(4)]
    path = write_log(tmp_path / "a.mcap", messages, metadata={"sensor_rig": "truck 7", "map_version": "2026-02"})
    data, (arrays,) = load(path, tmp_path / "out", "speed=/odom:twist.linear", "front=/cam:data", rate_hz=5.0, channels=1)
    time_s = (arrays["time_ns"] - START) / NS
    np.testing.assert_allclose(np.diff(time_s), 0.2, atol=1e-6)
    assert time_s[0] == pytest.approx(0.05, abs=1e-6)  # the first moment at which both topics have spoken
    assert (arrays["speed"][:, 0] <= time_s + 1e-6).all()
    assert (time_s - arrays["speed"][:, 0] < 0.1 + 1e-6).all()
    assert arrays["front"].shape == (len(time_s), 1, 6, 8)
    shown = np.floor((time_s - 0.05 + 1e-6) / 0.5).clip(max=3) * 20 / 255
    np.testing.assert_allclose(arrays["front"].mean(axis=(1, 2, 3)), shown, atol=1e-3)
    metadata = data.sequences[0].metadata
    assert (metadata["sensor_rig"], metadata["map_version"], metadata["date"]) == ("truck 7", "2026-02", "2026-03-31")


def test_a_gap_ends_the_drive(tmp_path: Path) -> None:
    path = write_log(tmp_path / "a.mcap", [odometry(s) for s in (*np.arange(0, 3, 0.1), *np.arange(20, 23, 0.1))])
    data, parts = load(path, tmp_path / "out", "speed=/odom:twist.linear.0", max_age_s=0.5)
    assert [sequence.id for sequence in data.sequences] == ["a-000", "a-001"]
    assert {sequence.metadata["recording"] for sequence in data.sequences} == {"a"}
    assert all(part["speed"].ndim == 1 for part in parts)
    assert parts[0]["speed"].max() < 3 < 20 <= parts[1]["speed"].min() + 0.2


def test_logs_of_a_folder_each_stay_in_one_split(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in "abcd":
        write_log(tmp_path / "logs" / f"{name}.mcap", [odometry(s) for s in (*np.arange(0, 2, 0.1), *np.arange(9, 11, 0.1))])
    made = import_data(source=tmp_path / "logs", format="mcap", out=tmp_path / "out", topic=["v=/odom:stamp"], val=0.25, test=0.25)
    data = open_dataset(made.root)
    places = {s.id: name for name, ids in data.splits.items() for s in data.sequences if s.id in ids}
    assert len(data.sequences) == 8
    assert all(places[f"{name}-000"] == places[f"{name}-001"] for name in "abcd")


BAD: dict[str, tuple[list[Message], str, str, str]] = {
    "no topic": ([odometry(0)], "json", "x=/gps:lat", "has no messages of the topic /gps"),
    "no field": ([odometry(0)], "json", "x=/odom:twist.angular", "messages have no field 'twist.angular'.*linear"),
    "text": ([("/odom", 0, {"name": "car 7!"})], "json", "x=/odom:name", "neither number, list nor image"),
    "object": ([odometry(0)], "json", "x=/odom:twist", "no number and no list of numbers"),
    "no json": ([("/odom", 0, b"{")], "json", "x=/odom:a", "a message is not JSON"),
    "shapes": ([("/odom", k * 0.2, {"a": [0] * (k + 1)}) for k in range(3)], "json", "x=/odom:a", "different shapes"),
    "huge": ([("/odom", 0, b'{"a": 1' + b"0" * 400 + b"}")], "json", "x=/odom:a", "no number and no list of numbers"),
    "encoding": ([("/odom", 0, b"abc")], "smoke", "x=/odom:a", "an encoding that cannot be decoded.*smoke"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_logs_are_told_and_nothing_is_written(tmp_path: Path, case: str) -> None:
    messages, encoding, topic, message = BAD[case]
    path = write_log(tmp_path / "a.mcap", messages, encoding=encoding)
    with pytest.raises(DataError, match=message):
        load(path, tmp_path / "out", topic)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "found"), [("NaN", "nan"), ("-Infinity", "-inf"), ("1e39", r"1e\+39"), ("1e999", "inf")])
def test_numbers_that_are_not_finite_are_refused_with_their_place(tmp_path: Path, number: str, found: str) -> None:
    """JSON of robots has them, and ROS messages say "no return" with infinity: they would end in a training's loss."""
    messages = [("/odom", k * 0.2, b'{"a": [0.5, %s]}' % (number if k == 3 else "1").encode()) for k in range(6)]
    path = write_log(tmp_path / "a.mcap", messages)
    said = rf"a\.mcap: /odom:a at 2026-03-31T00:00:00\.600000Z: .*not finite.*found {found}\).*Import another field"
    with pytest.raises(DataError, match=said) as caught:
        load(path, tmp_path / "out", "x=/odom:a")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [0, 4, 200, -30])
def test_damaged_logs_are_told(tmp_path: Path, kept: int) -> None:
    path = write_log(tmp_path / "a.mcap", [odometry(k * 0.1) for k in range(50)])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="a.mcap"):
        load(path, tmp_path / "out", "x=/odom:stamp")


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = write_log(tmp_path / "a.mcap", [odometry(k * 0.1) for k in range(50)])
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="a.mcap"):
        load(path, tmp_path / "out", "x=/odom:stamp")


@pytest.mark.parametrize("text", ["x", "x=", "=/a", "=/a:b", "1x=/a:b", "x=:b", "x=/a:"])
def test_topics_are_of_one_form(text: str) -> None:
    with pytest.raises(ConfigError, match="is no topic"):
        Topic.parse(text)


def test_a_topic_as_a_whole() -> None:
    assert Topic.parse("front=/cam/image_raw") == Topic("front", "/cam/image_raw", "")

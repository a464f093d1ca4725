"""MCAP logs as robots write them: ROS 2 messages in CDR, and the schemas of Foxglove in protobuf."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mcap_protobuf.writer
import mcap_ros2.writer
import numpy as np
from google.protobuf import descriptor_pb2, timestamp_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

START = 1_774_915_200_000_000_000  # 2026-03-31 in UTC
NS = 1_000_000_000
Message = tuple[str, float, str, Any]
"""Topic, seconds since the start, type, content."""

HEADER = "std_msgs/Header header"
NESTED = {
    "std_msgs/Header": "builtin_interfaces/Time stamp\nstring frame_id",
    "sensor_msgs/PointField": "string name\nuint32 offset\nuint8 datatype\nuint32 count",
    "geometry_msgs/Vector3": "float64 x\nfloat64 y\nfloat64 z",
    "geometry_msgs/Point": "float64 x\nfloat64 y\nfloat64 z",
    "geometry_msgs/Quaternion": "float64 x\nfloat64 y\nfloat64 z\nfloat64 w",
    "geometry_msgs/Pose": "geometry_msgs/Point position\ngeometry_msgs/Quaternion orientation",
    "geometry_msgs/Twist": "geometry_msgs/Vector3 linear\ngeometry_msgs/Vector3 angular",
    "geometry_msgs/PoseWithCovariance": "geometry_msgs/Pose pose\nfloat64[36] covariance",
    "geometry_msgs/TwistWithCovariance": "geometry_msgs/Twist twist\nfloat64[36] covariance",
}
ROS = {
    "sensor_msgs/msg/Image": f"{HEADER}\nuint32 height\nuint32 width\nstring encoding\nuint8 is_bigendian\nuint32 step\nuint8[] data",
    "sensor_msgs/msg/CompressedImage": f"{HEADER}\nstring format\nuint8[] data",
    "sensor_msgs/msg/PointCloud2": f"{HEADER}\nuint32 height\nuint32 width\nsensor_msgs/PointField[] fields\nbool is_bigendian\n"
                                   "uint32 point_step\nuint32 row_step\nuint8[] data\nbool is_dense",
    "sensor_msgs/msg/Imu": f"{HEADER}\ngeometry_msgs/Quaternion orientation\nfloat64[9] orientation_covariance\n"
                           "geometry_msgs/Vector3 angular_velocity\nfloat64[9] angular_velocity_covariance\n"
                           "geometry_msgs/Vector3 linear_acceleration\nfloat64[9] linear_acceleration_covariance",
    "sensor_msgs/msg/NavSatFix": f"{HEADER}\nfloat64 latitude\nfloat64 longitude\nfloat64 altitude",
    "nav_msgs/msg/Odometry": f"{HEADER}\nstring child_frame_id\ngeometry_msgs/PoseWithCovariance pose\n"
                             "geometry_msgs/TwistWithCovariance twist",
}


def write_ros2(path: Path, messages: Sequence[Message]) -> Path:
    """A log of ROS 2 messages; content of bytes is written as it is, undecodable as it may be."""
    with path.open("wb") as stream:
        writer = mcap_ros2.writer.Writer(stream)
        schemas = {kind: writer.register_msgdef(kind, definition(kind)) for kind in dict.fromkeys(m[2] for m in messages)}
        for topic, seconds, kind, content in messages:
            time_ns = START + round(seconds * NS)
            if isinstance(content, bytes):
                channel = writer._channel_ids.get(topic) or writer._writer.register_channel(topic, "cdr", schemas[kind].id)
                writer._channel_ids[topic] = channel
                writer._writer.add_message(channel, time_ns, content, time_ns)
            else:
                writer.write_message(topic, schemas[kind], content, log_time=time_ns)
        writer.finish()  # type: ignore[no-untyped-call]
    return path


def definition(kind: str) -> str:
    """The .msg text of a type with all that it is made of."""
    parts, wanted = [ROS[kind]], [ROS[kind]]
    seen: set[str] = set()
    while wanted:
        text = wanted.pop()
        for name in NESTED:
            if name in text and name not in seen:
                seen.add(name)
                wanted.append(NESTED[name])
                parts.append(f"MSG: {name}\n{NESTED[name]}")
    return ("\n" + "=" * 80 + "\n").join(parts)


def image(pixels: np.ndarray[Any, Any], encoding: str, *, padding: int = 0, big: bool = False) -> dict[str, Any]:
    """sensor_msgs/Image of pixels (H, W) or (H, W, S), each row followed by `padding` bytes."""
    height, width = pixels.shape[:2]
    stored = np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder(">" if big else "<"))).reshape(height, -1)
    rows = np.pad(stored.view(np.uint8).reshape(height, -1), ((0, 0), (0, padding)), constant_values=77)
    return {"height": height, "width": width, "encoding": encoding, "is_bigendian": int(big), "step": rows.shape[1],
            "data": rows.tobytes()}


ROS_NUMBERS = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 8}
FOXGLOVE_NUMBERS = {"u1": 1, "i1": 2, "u2": 3, "i2": 4, "u4": 5, "i4": 6, "f4": 7, "f8": 8}


def cloud(points: np.ndarray[Any, Any], *, rows: int = 1, padding: int = 0, big: bool = False) -> dict[str, Any]:
    """sensor_msgs/PointCloud2 of a structured array, in rows of points each followed by `padding` bytes."""
    order = ">" if big else "<"
    step, width = points.dtype.itemsize, len(points) // rows
    fields = [{"name": name, "offset": offset, "count": 1, "datatype": ROS_NUMBERS[kind]} for name, offset, kind in columns(points)]
    stored = np.ascontiguousarray(points.astype(points.dtype.newbyteorder(order))).view(np.uint8).reshape(rows, width * step)
    content = np.pad(stored, ((0, 0), (0, padding)), constant_values=77)
    return {"height": rows, "width": width, "fields": fields, "is_bigendian": big, "point_step": step,
            "row_step": content.shape[1], "data": content.tobytes(), "is_dense": False}


def columns(points: np.ndarray[Any, Any]) -> list[tuple[str, int, str]]:
    """Name, offset and type, such as `f4`, of the columns of a structured array."""
    assert points.dtype.fields is not None
    return [(name, offset, kind.str[1:]) for name, (kind, offset, *_) in points.dtype.fields.items()]


def foxglove(name: str) -> Any:
    """The protobuf class of `foxglove.<name>`."""
    return GetMessageClass(_POOL.FindMessageTypeByName(f"foxglove.{name}"))


def foxglove_cloud(points: np.ndarray[Any, Any]) -> Any:
    """foxglove.PointCloud of a structured array."""
    made = foxglove("PointCloud")(point_stride=points.dtype.itemsize, data=points.tobytes())
    for name, offset, kind in columns(points):
        made.fields.add(name=name, offset=offset, type=FOXGLOVE_NUMBERS[kind])
    return made


def write_protobuf(path: Path, messages: Sequence[tuple[str, float, Any]]) -> Path:
    """A log of protobuf messages (topic, seconds, message)."""
    with path.open("wb") as stream, mcap_protobuf.writer.Writer(stream) as writer:
        for topic, seconds, content in messages:
            writer.write_message(topic, content, log_time=START + round(seconds * NS), publish_time=START)
    return path


def _pool() -> DescriptorPool:
    """The schemas of Foxglove, as far as the tests use them: their field numbers need not be Foxglove's."""
    kinds = {"Timestamp": 11, "string": 9, "uint32": 13, "fixed32": 7, "bytes": 12, "double": 1}
    messages = {
        "RawImage": ["Timestamp timestamp", "string frame_id", "fixed32 width", "fixed32 height", "string encoding",
                     "fixed32 step", "bytes data"],
        "CompressedImage": ["Timestamp timestamp", "string frame_id", "bytes data", "string format"],
        "PackedElementField": ["string name", "fixed32 offset", "uint32 type"],
        "PointCloud": ["Timestamp timestamp", "string frame_id", "fixed32 point_stride", "PackedElementField fields", "bytes data"],
        "LocationFix": ["Timestamp timestamp", "double latitude", "double longitude", "double altitude"],
    }
    file = descriptor_pb2.FileDescriptorProto(name="foxglove/all.proto", package="foxglove", syntax="proto3",
                                              dependency=["google/protobuf/timestamp.proto"])
    for name, fields in messages.items():
        made = file.message_type.add(name=name)
        for number, field in enumerate(fields, 1):
            kind, own = field.split()
            repeated = kind == "PackedElementField"
            made.field.add(name=own, number=number, label=3 if repeated else 1, type=kinds.get(kind, 11), type_name={
                "Timestamp": ".google.protobuf.Timestamp", "PackedElementField": ".foxglove.PackedElementField"}.get(kind))
    pool = DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return pool


_POOL = _pool()

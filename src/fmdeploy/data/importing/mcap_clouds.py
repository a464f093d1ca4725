"""Point clouds of logs: sensor_msgs/PointCloud2 and foxglove.PointCloud.

Points of which a chosen column is not finite are left out: drivers write NaN or infinity for "no return".

Legend: T frames, P points, F chosen columns, H R rows of a cloud and bytes of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.data.importing.mcap_fields import bytes_of, has, member, whole
from fmdeploy.errors import DataError

ROS_TYPES = ("", "i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8")  # sensor_msgs/PointField, from 1
FOXGLOVE_TYPES = ("", "u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8")  # foxglove.PackedElementField, from 1
PLACE = ("x", "y", "z")
USUAL = "intensity"


class Cloud(NamedTuple):
    """Points float32 (P, F), and the names of their columns."""

    point_PF: Array
    columns: tuple[str, ...]


def is_cloud(value: Any) -> bool:
    """Whether a message is a point cloud."""
    return has(value, "fields", "data") and (has(value, "point_step") or has(value, "point_stride"))


def cloud_of(message: Any, columns: tuple[str, ...], *, where: str) -> Cloud:
    """The points of a message, as the columns that are asked for; none: x, y, z, and intensity where it has that.

    Raises:
        DataError: it lacks a column, or its sizes and its data do not agree.
    """
    ros = has(message, "point_step")
    step = whole(message, "point_step" if ros else "point_stride", where)
    byte_PS = _rows(message, step, where) if ros else _packed(message, step, where)
    said = member(message, "fields")
    fields = {str(member(field, "name")): field for field in said} if isinstance(said, Sequence) else {}
    chosen = columns or (*PLACE, *((USUAL,) if USUAL in fields else ()))
    if absent := [name for name in chosen if name not in fields]:
        raise DataError(f"a point cloud has no column {absent[0]!r}", where=where,
                        found=", ".join(fields) or "none")
    order = ">" if member(message, "is_bigendian") else "<"
    kinds = [order + kind for kind in (ROS_TYPES if ros else FOXGLOVE_TYPES)]
    found = [_column(fields[name], byte_PS, kinds, where) for name in chosen]
    point_PF = np.stack(found, axis=1)
    return Cloud(point_PF[np.isfinite(point_PF).all(axis=1)], chosen)


def _rows(message: Any, step: int, where: str) -> Array:
    """The bytes (P, step) of points that lie in rows, which may be padded."""
    height, width, row_step = (whole(message, name, where) for name in ("height", "width", "row_step"))
    content = bytes_of(member(message, "data"), where)
    if step == 0 or row_step < width * step or len(content) != height * row_step:
        raise DataError("a point cloud's sizes and data do not agree", where=where,
                        expected=f"height x row_step bytes, at least {width * step} a row",
                        found=f"{height} rows of row_step {row_step}, {width} points of {step} bytes, "
                              f"{len(content)} bytes")
    byte_HR = np.frombuffer(content, np.uint8).reshape(height, row_step)[:, : width * step]
    return byte_HR.reshape(height * width, step)


def _packed(message: Any, step: int, where: str) -> Array:
    """The bytes (P, step) of points one after the other."""
    content = bytes_of(member(message, "data"), where)
    if step == 0 or len(content) % step:
        raise DataError("a point cloud's sizes and data do not agree", where=where,
                        expected=f"a multiple of {step} bytes", found=f"{len(content)} bytes")
    return np.frombuffer(content, np.uint8).reshape(-1, step)


def _column(field: Any, byte_PS: Array, types: Sequence[str], where: str) -> Array:
    """One column float32 (P,)."""
    name, offset = member(field, "name"), whole(field, "offset", where)
    kind = whole(field, "datatype" if has(field, "datatype") else "type", where)
    if not 0 < kind < len(types):
        raise DataError(f"the column {name!r} of a point cloud has an unknown type", where=where, found=kind,
                        expected=f"1 to {len(types) - 1}")
    dtype = np.dtype(types[kind])
    if (member(field, "count") or 1) != 1 or offset + dtype.itemsize > byte_PS.shape[1]:
        raise DataError(f"the column {name!r} of a point cloud does not fit into a point", where=where,
                        expected=f"one value within {byte_PS.shape[1]} bytes",
                        found=f"{member(field, 'count') or 1} of {dtype.itemsize} bytes at {offset}")
    content = np.ascontiguousarray(byte_PS[:, offset : offset + dtype.itemsize])
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is left out as such
        return content.view(dtype).reshape(-1).astype(np.float32)


def stack_clouds(clouds: Sequence[Cloud], most: int | None) -> tuple[Array, Array]:
    """Clouds as one array float32 (T, P, F) with zeros behind the last point, and the numbers of points int64 (T,).

    Args:
        clouds: One a frame, of the same columns.
        most: P; clouds with more points are thinned evenly in their own order. None: the points of the fullest.
    """
    room = most or max(1, *(len(cloud.point_PF) for cloud in clouds))
    point_TPF = np.zeros((len(clouds), room, len(clouds[0].columns)), np.float32)
    count_T = np.zeros(len(clouds), np.int64)
    for t, cloud in enumerate(clouds):
        total = len(cloud.point_PF)
        kept_PF = cloud.point_PF if total <= room else cloud.point_PF[np.arange(room) * total // room]
        point_TPF[t, : len(kept_PF)], count_T[t] = kept_PF, len(kept_PF)
    return point_TPF, count_T

"""What one topic says at one moment: a number, a list of numbers, an image or a point cloud."""

from __future__ import annotations

from typing import Any

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.data.importing.mcap_clouds import Cloud, cloud_of, is_cloud
from fmdeploy.data.importing.mcap_fields import bytes_of, has, member, names_of
from fmdeploy.data.importing.mcap_images import is_raw_image, raw_image
from fmdeploy.data.importing.pictures import decode_image
from fmdeploy.errors import DataError

LARGEST = float(np.finfo(np.float32).max)


def value_of(content: Any, field: str, size: tuple[int, int] | None, channels: int, *, where: str) -> Array | Cloud:
    """One message's field as float32.

    Args:
        content: The message, decoded.
        field: A dotted path, with numbers for the elements of lists; of a point cloud its columns, such as `x,y,z`;
            empty: the message as a whole.
        size: (H, W) of images; None: as they are.
        channels: Of images.
        where: For messages.

    Raises:
        DataError: there is no such field, or it is none of what this reads.
    """
    value, columns = _picked(content, field, where)
    if is_cloud(value):
        return cloud_of(value, columns, where=where)
    if is_raw_image(value):
        return raw_image(value, size, channels, where=where)
    if _is_compressed(value):
        return decode_image(_compressed(value, where), size, channels, where=where)
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return decode_image(bytes_of(value, where), size, channels, where=where)
    return _numbers(value, where)


def _picked(content: Any, field: str, where: str) -> tuple[Any, tuple[str, ...]]:
    """The value at a path, and the columns where it is a point cloud's."""
    value, rest = content, field
    while rest:
        part, _, after = rest.partition(".")
        if rest == "data" and (is_cloud(value) or is_raw_image(value) or _is_compressed(value)):
            return value, ()  # its bytes mean nothing without the fields beside them
        found = member(value, part)
        if found is None and is_cloud(value):
            return value, tuple(rest.split(","))
        if found is None:
            raise DataError(f"messages have no field {field!r}", where=where, found=names_of(value))
        value, rest = found, after
    return value, ()


def _is_compressed(value: Any) -> bool:
    return has(value, "format", "data")


def _compressed(value: Any, where: str) -> bytes:
    """The bytes of sensor_msgs/CompressedImage or foxglove.CompressedImage: Pillow finds out what they are."""
    if "compressedDepth" in str(member(value, "format")):
        raise DataError("is a compressed depth image, which is not read", where=where,
                        found=repr(member(value, "format"))[:60], expected="JPEG, PNG, or a raw image")
    return bytes_of(member(value, "data"), where)


def _numbers(value: Any, where: str) -> Array:
    try:
        found = np.asarray(value, np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError("a field is no number and no list of numbers", where=where, found=repr(value)[:40]) from error
    if (odd := found[~(np.abs(found) <= LARGEST)]).size:
        raise DataError("a field holds a number that is not finite in float32", where=where, found=f"{odd[0]:g}",
                        fix="Import another field, or the log without such messages")
    return found.astype(np.float32)

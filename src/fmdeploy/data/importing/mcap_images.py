"""Raw images of logs: sensor_msgs/Image and foxglove.RawImage.

Encodings that name colours or brightness become 0 .. 1. `16UC1` and `32FC1` name numbers, mostly depth in millimetres
and in metres (ROS enhancement proposal 118): they stay numbers, with 0 for "no return", which 32FC1 writes as NaN or
infinity.

Legend: H W rows and columns, S samples a pixel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.data.importing.mcap_fields import bytes_of, has, member, whole
from fmdeploy.data.importing.pictures import MAX_PIXELS, pixel_planes
from fmdeploy.errors import DataError


class Layout(NamedTuple):
    """How a pixel is stored: type of a sample, how many, and where red, green, blue (or grey) are among them."""

    dtype: str
    samples: int
    order: tuple[int, ...]
    numbers: bool = False


LAYOUTS = {
    "rgb8": Layout("u1", 3, (0, 1, 2)), "bgr8": Layout("u1", 3, (2, 1, 0)),
    "rgba8": Layout("u1", 4, (0, 1, 2)), "bgra8": Layout("u1", 4, (2, 1, 0)),
    "mono8": Layout("u1", 1, (0,)), "8UC1": Layout("u1", 1, (0,)), "mono16": Layout("u2", 1, (0,)),
    "16UC1": Layout("u2", 1, (0,), numbers=True), "32FC1": Layout("f4", 1, (0,), numbers=True),
}


def is_raw_image(value: Any) -> bool:
    """Whether a message is one."""
    return has(value, "height", "width", "encoding", "step", "data")


def raw_image(message: Any, size: tuple[int, int] | None, channels: int, *, where: str) -> Array:
    """One image as float32 (channels, H, W); (1, H, W) of the encodings that are numbers.

    Args:
        message: One of `is_raw_image`.
        size: (H, W) to resize to; numbers are not mixed: the nearest one is taken. None: as it is.
        channels: 1 grey, 3 RGB.
        where: For messages.

    Raises:
        DataError: its encoding is unknown, or its sizes and its data do not agree.
    """
    encoding = member(message, "encoding")
    layout = LAYOUTS.get(encoding) if isinstance(encoding, str) else None
    if layout is None:
        raise DataError("a raw image has an encoding that is not read", where=where, found=repr(encoding)[:40],
                        expected=", ".join(LAYOUTS))
    pixel_HWS = _pixels(message, layout, where)
    if not layout.numbers:
        chosen = pixel_HWS[..., list(layout.order)]
        return pixel_planes(chosen if len(layout.order) == 3 else chosen[..., 0], size, channels)
    number_HW = pixel_HWS[..., 0].astype(np.float32)
    number_HW[~np.isfinite(number_HW)] = 0
    return (number_HW if size is None else _nearest(number_HW, size))[None]


def _pixels(message: Any, layout: Layout, where: str) -> Array:
    height, width, step = (whole(message, name, where) for name in ("height", "width", "step"))
    content = bytes_of(member(message, "data"), where)
    dtype = np.dtype(layout.dtype).newbyteorder(">" if member(message, "is_bigendian") else "<")
    row = width * dtype.itemsize * layout.samples
    if not (0 < height * width <= MAX_PIXELS and step >= row and len(content) == height * step):
        raise DataError("a raw image's sizes and data do not agree", where=where,
                        expected=f"height x step bytes, at least {row} a row, at most {MAX_PIXELS} pixels",
                        found=f"{height} rows of step {step}, {width} pixels wide, {len(content)} bytes")
    byte_HR = np.frombuffer(content, np.uint8).reshape(height, step)[:, :row]
    pixels = np.ascontiguousarray(byte_HR).view(dtype).reshape(height, width, layout.samples)
    return pixels.astype(dtype.newbyteorder("="))


def _nearest(number_HW: Array, size: tuple[int, int]) -> Array:
    rows, columns = ((np.arange(new) + 0.5) * old // new for new, old in zip(size, number_HW.shape, strict=True))
    return number_HW[np.ix_(rows.astype(int), columns.astype(int))]

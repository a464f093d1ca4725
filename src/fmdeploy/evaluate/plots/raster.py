"""PNG files from arrays, with nothing but zlib: equal pixels give equal bytes."""

# H rows, W columns

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
import numpy.typing as npt


def png_bytes(image_HW3: npt.NDArray[np.uint8]) -> bytes:
    """An 8-bit RGB PNG (ISO/IEC 15948) of (H, W, 3) uint8."""
    height, width, _ = image_HW3.shape
    rows = np.zeros((height, 1 + width * 3), np.uint8)  # each row starts with filter type 0
    rows[:, 1:] = image_HW3.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (("IHDR", header), ("IDAT", zlib.compress(rows.tobytes(), 9)), ("IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name.encode(), data) for name, data in parts)


def data_uri(image_HW3: npt.NDArray[np.uint8]) -> str:
    """The PNG as a `data:` address, for an `<img>` in a page that loads nothing."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image_HW3)).decode()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

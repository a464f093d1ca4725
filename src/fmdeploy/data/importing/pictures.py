"""Images from strangers: decoded, turned as their EXIF says, resized, as float32 planes between 0 and 1.

The one place that talks to Pillow.
"""

from __future__ import annotations

import io
import warnings

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.data.importing.drives import reason_of
from fmdeploy.errors import DataError
from fmdeploy.optional import require

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 64 * 2**20
DEEP = {"I;16": 65535.0, "I;16B": 65535.0, "I;16L": 65535.0, "I": 65535.0}


def decode_image(content: bytes, size: tuple[int, int] | None, channels: int, *, where: object) -> Array:
    """One image as float32 (channels, H, W) in 0 .. 1.

    Args:
        content: An encoded image.
        size: (H, W) to resize to, bilinear with antialiasing; None: as it is.
        channels: 1 grey, 3 RGB.
        where: For messages.

    Raises:
        DataError: it is no image, broken, or larger than 64 megapixels.
    """
    image_module, ops = require("PIL.Image"), require("PIL.ImageOps")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow only warns of decompression bombs and of truncated data
            with image_module.open(io.BytesIO(content)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError("is too large an image", where=where, expected=f"at most {MAX_PIXELS} pixels",
                                    found=f"{image.width} x {image.height}")
                upright = ops.exif_transpose(image)
                upright.load()
                return _planes(upright, size, channels)
    except DataError:
        raise
    except Exception as error:  # Pillow raises what its many decoders raise: OSError, SyntaxError, struct.error, ...
        raise DataError(f"cannot be read as an image: {reason_of(error)}", where=where) from error


def pixel_planes(pixels: Array, size: tuple[int, int] | None, channels: int) -> Array:
    """Pixels uint8 (H, W) or (H, W, 3), or uint16 (H, W), as `decode_image` gives them."""
    return _planes(require("PIL.Image").fromarray(np.ascontiguousarray(pixels)), size, channels)


def _planes(image: object, size: tuple[int, int] | None, channels: int) -> Array:
    resampling = require("PIL.Image").Resampling.BILINEAR
    mode = getattr(image, "mode", "")
    if mode in DEEP:  # 16 bits a pixel: converting to L would clip them
        plain = image.convert("F").point(lambda x: x * (1 / DEEP[mode]))  # type: ignore[attr-defined]
        if size is not None:
            plain = plain.resize(size[::-1], resampling)
        grey_HW = np.asarray(plain, np.float32)
        return np.repeat(grey_HW[None], channels, axis=0)
    plain = image.convert("RGB" if channels == 3 else "L")  # type: ignore[attr-defined]
    if size is not None:
        plain = plain.resize(size[::-1], resampling)
    pixels = np.asarray(plain, np.float32) / 255.0
    return np.ascontiguousarray(pixels.transpose(2, 0, 1) if channels == 3 else pixels[None])

"""The structure of a frame: what the calling program must get right, whatever the sensors see."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.errors import FrameError
from fmdeploy.iospec import TensorSpec


class StructureGuard:
    """Type, dtype, shape and layout of one input."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec, self.name = spec, spec.name
        self.dtype, self.shape = np.dtype(spec.dtype), spec.shape
        shape = spec.shape
        self.ambiguous = len(shape) == 3 and (shape[1], shape[2], shape[0]) == shape

    def check(self, value: object, layout: str | None) -> None:
        """Accept exactly what io.json says.

        Raises:
            FrameError: Something differs; the text says expected against found.
        """
        # Exactly ndarray: a masked array loses its mask, a memory map dies by SIGBUS when its file is truncated.
        if type(value) is not np.ndarray or value.dtype != self.dtype or value.shape != self.shape:
            raise self._structure_error(value)
        if value.base is not None:
            self._check_owner(value)
        if layout is None and self.ambiguous:
            raise FrameError("any axis could be the channels: state the layout", where=f"input {self.name!r}",
                             expected=self.spec.layout, found=layout)
        if layout is not None and layout != self.spec.layout:
            raise FrameError("has the wrong layout", where=f"input {self.name!r}", expected=self.spec.layout or "none",
                             found=layout)

    def _check_owner(self, value: Array) -> None:
        """Walk to the owner of the memory: a view of a memory map dies with it."""
        base: Any = value.base
        while base is not None:
            if isinstance(base, (np.memmap, mmap.mmap)):
                raise FrameError("is a view of a memory-mapped file: copy it first", where=f"input {self.name!r}")
            base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)

    def _structure_error(self, value: object) -> FrameError:
        where = f"input {self.name!r}"
        expected = f"numpy.ndarray {self.dtype.name} {self.shape} {self.spec.layout}".rstrip()
        if type(value) is not np.ndarray:
            found = f"{type(value).__module__}.{type(value).__qualname__}"
            return FrameError("is not a plain numpy array", where=where, expected=expected, found=found)
        found = f"{value.dtype.str if value.dtype.byteorder == '>' else value.dtype} {value.shape}"
        if value.dtype.newbyteorder("=") == self.dtype and value.dtype != self.dtype:
            return FrameError("has the wrong byte order", where=where, expected=expected, found=found,
                              fix="Convert with .astype(dtype.newbyteorder('='))")
        if value.dtype != self.dtype:
            what = "has the wrong dtype; nothing is cast silently"
        else:
            what = "has the wrong shape" + self._shape_hint(value.shape)
        return FrameError(what, where=where, expected=expected, found=found)

    def _shape_hint(self, shape: tuple[int, ...]) -> str:
        wanted = self.shape
        if len(wanted) == 3 and shape == (*wanted[1:], wanted[0]):
            return ": it looks channels-last (HWC), transpose it to CHW"
        if shape[1:] == wanted:
            return f": it has a batch axis of {shape[0]}, give one frame"
        return ""

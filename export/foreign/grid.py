"""The grid of one Q/DQ pair, and the symmetric grid that covers it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto, helper

from fmdeploy.errors import ModelFileError
from fmdeploy.onnxfile.graph import Array, Graph, attribute
from fmdeploy.onnxfile.structure import label


@dataclass(frozen=True)
class Grid:
    """Representable values scale * (q - zero) for q in [lowest, highest], per tensor () or per channel (C,)."""

    scale: Array
    zero: Array
    lowest: int
    highest: int
    axis: int | None = None

    @property
    def low(self) -> Array:
        """Smallest representable value, () or (C,)."""
        return np.asarray((self.lowest - self.zero) * self.scale)

    @property
    def high(self) -> Array:
        """Largest representable value, () or (C,)."""
        return np.asarray((self.highest - self.zero) * self.scale)

    @property
    def is_symmetric(self) -> bool:
        """Whether it is int8 with zero point 0, perhaps moved by 128 into uint8: the same numbers."""
        return bool(np.all(self.zero == self.lowest + 128))

    def same(self, other: Grid) -> bool:
        """Whether both hold the same numbers."""
        return (self.axis == other.axis and self.lowest - self.zero.min() == other.lowest - other.zero.min()
                and np.array_equal(self.scale, other.scale)
                and np.array_equal(self.zero - self.lowest, other.zero - other.lowest))

    def covering_scale(self) -> Array:
        """Scale of the int8 grid with zero point 0 that clips nothing which this one holds; () or (C,)."""
        if self.is_symmetric:
            return self.scale
        largest = np.maximum(np.abs(self.low), np.abs(self.high))
        return np.asarray(largest / 127, np.float32)


def grid_of(graph: Graph, node: NodeProto) -> Grid:
    """Read the grid of a Q or DQ node.

    Raises:
        ModelFileError: the scale is computed at run time, in blocks, or the type is no 8-bit integer.
    """
    scale = graph.constants.get(node.input[1])
    given = len(node.input) > 2 and node.input[2] != ""
    zero = graph.constants.get(node.input[2]) if given else None
    if scale is None or (given and zero is None):
        raise ModelFileError("computes its scale or zero point at run time", where=label(node),
                             fix="Quantise statically, with calibration data")
    if scale.ndim > 1:
        raise ModelFileError("has scales in blocks", where=label(node), fix="Use one scale a tensor or a channel")
    kind = zero.dtype if zero is not None else _kind_without_zero(graph, node)
    if kind not in (np.int8, np.uint8):
        raise ModelFileError("quantises to a type that INT8 hardware does not multiply", where=label(node),
                             expected="int8 or uint8", found=kind, fix="Quantise to 8 bits")
    limits = np.iinfo(kind)
    values = np.zeros(scale.shape, np.int32) if zero is None else zero.astype(np.int32)
    if scale.size == 1:
        return Grid(scale.reshape(()).astype(np.float32), values.reshape(()), int(limits.min), int(limits.max))
    axis = int(attribute(node, "axis", 1))
    return Grid(scale.astype(np.float32), values, int(limits.min), int(limits.max), axis)


def _kind_without_zero(graph: Graph, node: NodeProto) -> np.dtype[np.generic]:
    """ONNX: without a zero point a Q gives output_dtype, else uint8; a DQ takes what its input is."""
    if node.op_type == "QuantizeLinear":
        return np.dtype(helper.tensor_dtype_to_np_dtype(attribute(node, "output_dtype", 0) or TensorProto.UINT8))
    stored = graph.constants.get(node.input[0])
    if stored is not None:
        kind: np.dtype[np.generic] = stored.dtype
        return kind
    maker = graph.maker.get(node.input[0])
    if maker is None or maker.op_type != "QuantizeLinear":
        raise ModelFileError("reads 8-bit values that no QuantizeLinear made", where=label(node),
                             fix="Quantise inside the file, from float inputs")
    zero = graph.constants.get(maker.input[2]) if len(maker.input) > 2 else None
    return np.dtype(zero.dtype) if zero is not None else _kind_without_zero(graph, maker)


def cost_db(old: Grid, scale: Array) -> float:
    """How much coarser the grid with `scale` is, in dB of quantisation noise, at the worst channel."""
    return float(20 * np.log10(np.max(np.asarray(scale, np.float64) / np.asarray(old.scale, np.float64))))

"""What one kernel of an engine has to do, independent of the device that does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")

BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}
COMPUTE = ("conv", "gemm", "matmul", "attention")  # kinds that run on the matrix units
INT8_KINDS = ("conv", "depthwise", "gemm", "pointwise", "pool", "resize", "copy")  # what INT8 reaches in a float file


@dataclass(frozen=True)
class Work:
    """One kernel: a convolution or matrix product with what is fused into it, or a pass over memory.

    Attributes:
        name: of the node that gives the kernel its name.
        kind: "conv", "depthwise" (one input channel a group: memory decides), "gemm" (a product with weights), "matmul"
            (a product of two activations), "attention" (two products and the softmax between them, fused), "pointwise",
            "norm", "softmax", "pool", "resize", "copy" (transpose, concat, slice, gather), or another word: memory
            only, never INT8.
        macs: multiply-adds a sample.
        weights: elements that are read once a batch.
        reads: activation elements read a sample.
        writes: activation elements written a sample.
        inner: length of the dot products (input channels × kernel of one group); 0 where unknown.
        outer: output channels of one group; 0 where unknown.
        int8: what the file says: True, INT8 operands; False, float; None, nothing, so that the kind decides.
        int8_activations: how many of the elements read and written are INT8 when INT8 is asked for; None means all of
            them in an INT8 kernel, none in another.
    """

    name: str
    kind: str
    macs: int = 0
    weights: int = 0
    reads: int = 0
    writes: int = 0
    inner: int = 0
    outer: int = 0
    int8: bool | None = None
    int8_activations: int | None = None

    def precision(self, asked: Precision, rest: Precision = "fp16") -> Precision:
        """The precision that this kernel runs in: INT8 only where INT8 reaches it, `rest` otherwise."""
        if asked != "int8":
            return asked
        reached = self.kind in INT8_KINDS if self.int8 is None else self.int8
        return "int8" if reached else rest

    def bytes_moved(self, asked: Precision, batch: int, rest: Precision = "fp16") -> int:
        """Bytes that the kernel reads and writes for `batch` samples."""
        size = BYTES[self.precision(asked, rest)]
        activations = self.reads + self.writes
        if asked != "int8" or self.int8_activations is None:
            return (self.weights + batch * activations) * size
        small = self.int8_activations
        return self.weights * size + batch * (small + BYTES[rest] * (activations - small))

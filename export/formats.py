"""What the files of a bundle are: their operator set, their names, the choices that the command line offers."""

from __future__ import annotations

from typing import Literal

OPSET = 20  # the first with Gelu; TensorRT 10.3 reads up to 20
IR_VERSION = 9  # what opset 20 needs; readable by ONNX Runtime since 1.16 and by TensorRT 10 and 11
Rest = Literal["fp16", "fp32"]  # type of what is not INT8 in model.int8.onnx


def file_name(variant: str) -> str:
    """Name of a variant's file in the bundle."""
    return f"model.{variant}.onnx"

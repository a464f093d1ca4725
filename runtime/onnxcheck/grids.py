"""Rules on the grids of INT8: scales and zero points of Q, DQ and of the operators that hold their grids as inputs."""

from __future__ import annotations

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.runtime.onnxcheck.graphview import View, refuse
from fmdeploy.runtime.onnxcheck.model import Node
from fmdeploy.runtime.onnxcheck.numbers import TINY
from fmdeploy.runtime.onnxcheck.operators import DQ, Q
from fmdeploy.runtime.onnxcheck.tensors import INT32

CALIBRATE = "Quantise it again, with calibration data that reaches this tensor"
# Which inputs of an operator are scales: those of its operands and of its result.
SCALES = {Q: (1,), DQ: (1,), "QLinearConv": (1, 4, 6), "QLinearMatMul": (1, 4, 6)}


def check_grids(view: View) -> None:
    """Row F29: scales are positive, normal numbers, one or one a channel; zero points fit type and number.

    Raises:
        ModelFileError: Names the node.
    """
    for node in view.graph.nodes:
        for at in SCALES.get(node.op_type, ()):
            scale = view.constant(node.inputs[at]) if len(node.inputs) > at else None
            if scale is None:
                raise refuse(node, "has a scale that is computed, not stored", fix="Quantise it again, statically")
            _check_scale(node, scale)
            if node.op_type in (Q, DQ):
                _check_channels(node, scale, view)
                _check_zero_point(node, scale, view)


def _check_scale(node: Node, scale: Array) -> None:
    if scale.size == 0 or scale.dtype.kind != "f":
        raise refuse(node, "has no scale", found=f"{scale.dtype} {scale.shape}", fix=CALIBRATE)
    numbers = scale.astype(np.float64)
    # A float16 scale may be subnormal in float16: there, that is how small numbers look.
    wrong = numbers[~(np.isfinite(numbers) & (numbers >= TINY))]
    if wrong.size:
        raise refuse(node, "has a scale that is not a positive, normal number", found=f"{wrong.flat[0]:.3g}",
                     fix=CALIBRATE)


def _check_channels(node: Node, scale: Array, view: View) -> None:
    data = view.constants.get(node.inputs[0])
    axis = node.attributes.get("axis", 1)
    if scale.size == 1 or data is None or scale.ndim != 1 or not isinstance(axis, int):
        return
    rank = len(data.dims)
    if not -rank <= axis < rank or data.dims[axis] != scale.size:
        raise refuse(node, "has another number of scales than channels", expected=f"axis {axis} of {data.dims}",
                     found=scale.size, fix="Set axis to that of the output channels, one scale each")


def _check_zero_point(node: Node, scale: Array, view: View) -> None:
    if len(node.inputs) < 3 or not node.inputs[2]:
        return
    zero = view.constant(node.inputs[2])
    if zero is None:
        raise refuse(node, "has a zero point that is computed, not stored", fix="Quantise it again, statically")
    if zero.dtype.kind not in "iu" or (zero.size != scale.size):
        raise refuse(node, "has a zero point that does not fit its scale", expected=f"{scale.size} integers",
                     found=f"{zero.size} of {zero.dtype}", fix=CALIBRATE)
    data = view.constants.get(node.inputs[0]) if node.op_type == DQ else None
    if data is not None and data.data_type != view.constants[node.inputs[2]].data_type:
        raise refuse(node, "has a zero point of another type than the tensor", fix=CALIBRATE)
    if data is not None and data.data_type == INT32 and zero.any():
        raise refuse(node, "has an INT32 zero point that is not 0", found=zero.ravel()[:3], fix=CALIBRATE)

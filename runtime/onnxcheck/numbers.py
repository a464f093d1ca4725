"""Rules on sizes and values: stored tensors, shapes that a node asks for, scales and zero points."""

from __future__ import annotations

import math

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.errors import ModelFileError
from fmdeploy.runtime.onnxcheck.graphview import View, refuse, tensors_of
from fmdeploy.runtime.onnxcheck.model import INT32, MAX_ELEMENTS, STRING, Node, shown
from fmdeploy.runtime.onnxcheck.operators import DQ, PRODUCTS, Q

# The input that says how large the result is.
SHAPED_BY = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1}
MAX_MADE = 2**28  # elements that one such node may make: 1 GiB of float32
MAX_DENORMAL_SHARE = 0.01
TINY = float(np.finfo(np.float32).tiny)
CALIBRATE = "Quantise it again, with calibration data that reaches this tensor"
TRAIN = "Train or export it again"


def check_stored(view: View) -> None:
    """Rows M12 and M13: every stored tensor has a size that can be, and exactly the bytes for it.

    Raises:
        ModelFileError: Names the tensor.
    """
    for tensor in tensors_of(view.graph):
        if tensor.data_type == STRING:
            raise ModelFileError("holds text where numbers belong", where=tensor.where, fix="Export it again")
        tensor.array  # noqa: B018 - reading it is the check


def check_declared(view: View) -> None:
    """Row M13: no declared shape is negative or too large, and no node is asked for more than memory holds.

    Raises:
        ModelFileError: Names the tensor or the node.
    """
    graph = view.graph
    for value in (*graph.inputs, *graph.outputs, *graph.values):
        sizes = [size for size in value.dims or () if isinstance(size, int)]
        if any(size < 0 for size in sizes) or math.prod(sizes) > MAX_ELEMENTS:
            raise ModelFileError("declares a size that cannot be", where=f"tensor {shown(value.name)}", found=sizes[:8],
                                 expected=f"at most {MAX_ELEMENTS} elements", fix="Export it with the real shapes")
    for node in graph.nodes:
        if node.op_type in SHAPED_BY:
            _check_made(node, view)


def _check_made(node: Node, view: View) -> None:
    at = SHAPED_BY[node.op_type]
    wanted = view.constant(node.inputs[at]) if len(node.inputs) > at else None
    if wanted is None:
        raise refuse(node, "makes a tensor whose size only the input decides", fix="Export with static shapes")
    sizes = [int(size) for size in wanted.ravel()[:64]]
    if any(size < 0 for size in sizes) or math.prod(sizes) > MAX_MADE:
        raise refuse(node, "asks for more than memory holds", expected=f"at most {MAX_MADE} elements",
                     found=sizes[:8], fix="Export it with the real shapes")


def check_weights(view: View) -> None:
    """Row M18: no weight is NaN or infinite, too small for a processor to keep, or nothing but zeros.

    Raises:
        ModelFileError: Names the tensor.
    """
    for tensor in tensors_of(view.graph):
        array = tensor.array
        if array.dtype.kind != "f" or not array.size:
            continue
        if not _all_finite(array):
            bad = array[~np.isfinite(array)]
            raise ModelFileError("holds weights that are no numbers", where=tensor.where,
                                 found=f"{bad.size} of {array.size}, such as {bad.flat[0]}", fix=TRAIN)
        if array.dtype == np.float32 and (share := _denormal_share(array)) > MAX_DENORMAL_SHARE:
            raise ModelFileError("holds weights too small for float32, which a GPU takes for 0", where=tensor.where,
                                 expected=f"at most {MAX_DENORMAL_SHARE:.0%}", found=f"{share:.1%}", fix=TRAIN)
    for node in view.graph.nodes:
        if node.op_type in PRODUCTS:
            _check_not_all_zero(node, view)


def _all_finite(array: Array) -> bool:
    """NaN and infinity survive a sum of magnitudes; an overflowing sum of finite numbers is looked at closely."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(np.abs(array).sum(dtype=np.float64))
    return math.isfinite(total) or bool(np.isfinite(array).all())


def _denormal_share(array: Array) -> float:
    magnitude = np.abs(array)
    if float(magnitude.min(initial=1.0)) >= TINY:
        return 0.0
    return float(np.count_nonzero((magnitude > 0) & (magnitude < TINY)) / array.size)


def _check_not_all_zero(node: Node, view: View) -> None:
    tensor, way = view.stored_weight(node.inputs[1]) if len(node.inputs) > 1 else (None, [])
    if tensor is None:
        return
    array = tensor.array
    zero = _zero_point_of(way[-1], view) if way and array.dtype.kind in "iu" else None
    nothing = np.all(array == zero.ravel()[0]) if zero is not None and zero.size == 1 else not array.any()
    if array.size and nothing:
        raise ModelFileError("is a weight of nothing but zeros", where=tensor.where, found=node.where, fix=TRAIN)


def _zero_point_of(node: Node, view: View) -> Array | None:
    return view.constant(node.inputs[2]) if node.op_type == DQ and len(node.inputs) > 2 else None


def check_grids(view: View) -> None:
    """Row F29: scales are positive, normal numbers, one or one a channel; zero points fit type and number.

    Raises:
        ModelFileError: Names the node.
    """
    for node in view.graph.nodes:
        if node.op_type in (Q, DQ):
            scale = view.constant(node.inputs[1]) if len(node.inputs) > 1 else None
            if scale is None:
                raise refuse(node, "has a scale that is computed, not stored", fix="Quantise it again, statically")
            _check_scale(node, scale)
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

"""Rules on sizes and values: stored tensors, shapes that a node asks for, weights."""

from __future__ import annotations

import math

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.errors import ModelFileError
from fmdeploy.runtime.onnxcheck.graphview import View, refuse, tensors_of
from fmdeploy.runtime.onnxcheck.model import Node
from fmdeploy.runtime.onnxcheck.operators import DQ, PRODUCTS
from fmdeploy.runtime.onnxcheck.tensors import MAX_ELEMENTS, STRING, Tensor, shown

# The input that says how large the result is.
SHAPED_BY = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1}
MAX_MADE = 2**28  # elements that one such node may make: 1 GiB of float32
MAX_DENORMAL_SHARE = 0.01
BOUNDED = frozenset(("Where", "Clip", "Max", "Min", "Pad"))  # may be told "no bound" with an infinite constant
TINY = float(np.finfo(np.float32).tiny)
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
    """Row M18: no weight is NaN or infinite or too small for a processor to keep, and not all of them are zero.

    Raises:
        ModelFileError: Names the tensor.
    """
    bounds = _bounds(view)
    open_ended = {id(view.constants[name]) for name in bounds if name in view.constants}
    for tensor in tensors_of(view.graph):
        if not (id(tensor) in open_ended and _is_infinity(tensor.array)):
            _check_values(tensor, tensor.array)
    for node in view.graph.nodes:
        for name, value in node.attributes.items():
            if not (node.outputs[0] in bounds or node.op_type in BOUNDED) or not _is_infinity(value):
                _check_attribute(node, name, value)
    stored, zero = weights_and_zeros(view)
    if zero and len(zero) == stored:
        raise ModelFileError("is a network of nothing but zeros: no product has another weight", where=zero[0],
                             found=f"{stored} of {stored} weights", fix=TRAIN)


def _check_values(tensor: Tensor, array: Array) -> None:
    if array.dtype.kind != "f" or not array.size:
        return
    if not _all_finite(array):
        bad = array[~np.isfinite(array)]
        raise ModelFileError("holds weights that are no numbers", where=tensor.where,
                             found=f"{bad.size} of {array.size}, such as {bad.flat[0]}", fix=TRAIN)
    if array.dtype == np.float32 and (share := _denormal_share(array)) > MAX_DENORMAL_SHARE:
        raise ModelFileError("holds weights too small for float32, which a GPU takes for 0", where=tensor.where,
                             expected=f"at most {MAX_DENORMAL_SHARE:.0%}", found=f"{share:.1%}", fix=TRAIN)


def _check_attribute(node: Node, name: str, value: object) -> None:
    numbers = value if isinstance(value, list) else [value]
    odd = [one for one in numbers if isinstance(one, float) and not math.isfinite(one)]
    if odd:
        raise refuse(node, f"has the attribute {shown(name)}, which is no number", found=odd[0], fix=TRAIN)


def _bounds(view: View) -> set[str]:
    """Names that only operators read which compare or choose: there, infinity means "no bound" or "masked"."""
    readers = [(name, node.op_type in BOUNDED) for node in view.graph.nodes for name in node.inputs]
    return {name for name, fits in readers if fits} - {name for name, fits in readers if not fits}


def _is_infinity(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind == "f" and value.size == 1 and bool(np.isinf(value).all())
    return isinstance(value, float) and math.isinf(value)


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


def weights_and_zeros(view: View) -> tuple[int, list[str]]:
    """How many products have a stored weight, and the names of those weights that are nothing but zeros.

    A branch that begins as zero, as in a residual network, may have stayed there: odd, but no fault of the file.
    """
    stored, zero = 0, []
    for node in view.graph.nodes:
        tensor, way = (view.stored_weight(node.inputs[1])
                       if node.op_type in PRODUCTS and len(node.inputs) > 1 else (None, []))
        if tensor is not None and tensor.array.size:
            stored += 1
            if _nothing_but_zeros(tensor.array, way, view):
                zero.append(tensor.where)
    return stored, zero


def _nothing_but_zeros(array: Array, way: list[Node], view: View) -> bool:
    zero = _zero_point_of(way[-1], view) if way and array.dtype.kind in "iu" else None
    return bool(np.all(array == zero.ravel()[0])) if zero is not None and zero.size == 1 else not array.any()


def _zero_point_of(node: Node, view: View) -> Array | None:
    return view.constant(node.inputs[2]) if node.op_type == DQ and len(node.inputs) > 2 else None

"""The numbers of QuantizeLinear and DequantizeLinear: scales, zero points and axes that mean what they say.

A scale of 0, NaN or infinity runs in ONNX Runtime without an error and gives plausible outputs; one scale too few is
read past its end by some kernels. Only constants can be judged here: a computed scale is the lint's to refuse.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fmdeploy.errors import ModelFileError
from fmdeploy.onnxfile.graph import DQ, Array, Q, attribute
from fmdeploy.onnxfile.structure import label

CALIBRATE = "Quantise it again, with calibration data that reaches this tensor"


def check_grids(model: ModelProto) -> None:
    """Check every Q and DQ of a model whose shapes were inferred.

    Raises:
        ModelFileError: names the node whose scale, zero point or axis is wrong.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        tensor = attribute(node, "value") if node.op_type == "Constant" else None
        if isinstance(tensor, TensorProto):
            constants[node.output[0]] = tensor
    values = {v.name: v for v in (*model.graph.input, *model.graph.value_info, *model.graph.output)}
    for node in model.graph.node:
        if node.op_type in (Q, DQ):
            shape = _shape(node.input[0], values, constants)
            arrays = [numpy_helper.to_array(constants[n]) if n in constants else None for n in node.input[1:]]
            _check_scale(node, arrays[0], shape)
            _check_zero_point(node, arrays, values, constants)


def _shape(name: str, values: dict[str, ValueInfoProto], constants: dict[str, TensorProto]) -> list[int | None] | None:
    """Sizes of a tensor, None for an axis or a tensor that nothing says the size of."""
    if name in constants:
        return list(constants[name].dims)
    known = values.get(name)
    if known is None or not known.type.tensor_type.HasField("shape"):
        return None
    return [axis.dim_value if axis.HasField("dim_value") else None for axis in known.type.tensor_type.shape.dim]


def _check_scale(node: NodeProto, scale: Array | None, shape: list[int | None] | None) -> None:
    if scale is None:
        return
    if scale.size == 0:
        raise ModelFileError("has no scale", where=label(node), fix=CALIBRATE)
    numbers = scale.astype(np.float64)
    # A float16 scale may be subnormal: there, that is how small numbers look. In float32 it means a range of nothing,
    # and processors that flush such numbers to zero divide by zero.
    tiny = float(np.finfo(np.float32).tiny)
    wrong = numbers[~(np.isfinite(numbers) & (numbers >= tiny))]
    if wrong.size:
        raise ModelFileError("has a scale that is not a positive, normal number", where=label(node),
                             found=f"{wrong[0]:.3g}", fix=CALIBRATE)
    if scale.ndim == 0 or scale.size == 1 or shape is None:
        return
    _check_axis(node, scale, shape)


def _check_axis(node: NodeProto, scale: Array, shape: list[int | None]) -> None:
    axis, rank = int(attribute(node, "axis", 1)), len(shape)
    if not -rank <= axis < rank:
        raise ModelFileError("has scales along an axis that the tensor does not have", where=label(node),
                             expected=f"below {rank}", found=axis, fix="Set axis to that of the output channels")
    if scale.ndim > 1:
        if int(attribute(node, "block_size", 0)) <= 0 or scale.ndim != rank:
            raise ModelFileError("has scales in blocks without a block_size that fits", where=label(node),
                                 found=list(scale.shape), fix="Use one scale a tensor or a channel")
        return
    size = shape[axis]
    if size is not None and size != scale.size:
        raise ModelFileError("has another number of scales than channels", where=label(node), expected=size,
                             found=scale.size, fix="Set axis to that of the output channels, one scale each")


def _check_zero_point(
    node: NodeProto, arrays: list[Array | None], values: dict[str, ValueInfoProto], constants: dict[str, TensorProto]
) -> None:
    if len(node.input) < 3 or not node.input[2]:
        return
    scale, zero = arrays[0], arrays[1]
    other = node.input[0] if node.op_type == DQ else node.output[0]
    kinds = [constants[n].data_type if n in constants else values[n].type.tensor_type.elem_type
             for n in (node.input[2], other) if n in constants or n in values]
    if len(kinds) == 2 and kinds[0] != kinds[1] and 0 not in kinds:
        names = [helper.tensor_dtype_to_string(kind) for kind in kinds]
        raise ModelFileError("has a zero point of another type than the tensor", where=label(node), expected=names[1],
                             found=names[0], fix="Quantise it again")
    if zero is None:
        return
    if scale is not None and zero.shape != scale.shape and not (zero.size == scale.size == 1):
        raise ModelFileError("has another number of zero points than scales", where=label(node),
                             expected=list(scale.shape), found=list(zero.shape), fix="Quantise it again")
    if zero.dtype == np.int32 and np.any(zero != 0):
        raise ModelFileError("has an INT32 zero point that is not 0", where=label(node), found=zero.ravel()[:3],
                             fix="Quantise it again: a bias has no zero point")

"""Sizes of every tensor of an ONNX file, with a dynamic batch set to 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from fmdeploy.errors import ModelFileError
from fmdeploy.onnxfile.graph import Graph
from fmdeploy.onnxfile.session import cpu_session

Shape = tuple[int, ...]
FIX = "Export the file with static sizes"


def tensor_shapes(model: ModelProto, where: object) -> tuple[dict[str, Shape], int | None]:
    """Return the sizes of all tensors, and the batch that the file fixes (None where it is dynamic, then set to 1).

    Shape inference decides; tensors that it leaves open are found by running the file once in ONNX Runtime.

    Raises:
        ModelFileError: an input has another dynamic dimension than its first, or the sizes cannot be found.
    """
    fixed = ModelProto()
    fixed.CopyFrom(model)
    batch = _set_batch(fixed, where)
    del fixed.graph.value_info[:]  # notes of an exporter may be wrong, or of another batch
    try:
        inferred = onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True)
    except Exception as error:  # shape inference raises its own and protobuf's exceptions
        raise ModelFileError(f"has inconsistent shapes: {str(error).splitlines()[0][:120]}", where=where) from error
    shapes = _known(inferred)
    missing = [name for node in inferred.graph.node for name in node.output if name and name not in shapes]
    return shapes | (_by_running(inferred, missing, where) if missing else {}), batch


def _set_batch(model: ModelProto, where: object) -> int | None:
    """Set dynamic first dimensions to 1, outputs included; returns the first dimension where the file fixes it."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    found: int | None = None
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        if not value.type.tensor_type.HasField("shape"):
            raise ModelFileError(f"input {value.name!r} has no shape", where=where, fix=FIX)
        for axis, dim in enumerate(dims):
            if dim.WhichOneof("value") == "dim_value" and dim.dim_value > 0:
                continue
            if axis:
                raise ModelFileError(f"input {value.name!r} has a dynamic dimension", where=where,
                                     found=f"axis {axis} ({dim.dim_param or 'unnamed'})", fix=FIX)
            dim.dim_value = 1
            found = -1
        if found is None and dims:
            found = dims[0].dim_value
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    return None if found in (None, -1) else found


def _known(model: ModelProto) -> dict[str, Shape]:
    graph = model.graph
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.WhichOneof("value") == "dim_value" for d in dims):
            shapes.setdefault(value.name, tuple(d.dim_value for d in dims))
    return shapes


def _by_running(model: ModelProto, missing: list[str], where: object) -> dict[str, Shape]:
    """Run the file on zeros with the tensors of unknown size as additional outputs."""
    probe = ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in missing)
    session = cpu_session(probe.SerializeToString(), optimise=False)
    try:
        values = session.run(missing, _zeros(model))
    except Exception as error:  # onnxruntime's exceptions have no common public base class
        raise ModelFileError(f"does not run: {str(error).splitlines()[0][:120]}", where=where, fix=FIX) from error
    return {name: getattr(value, "shape", ()) for name, value in zip(missing, values, strict=True)}


def _zeros(model: ModelProto) -> dict[str, Any]:
    graph = Graph(model)
    feeds = {}
    for value in model.graph.input:
        if value.name not in graph.constants:
            kind = value.type.tensor_type
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type or TensorProto.FLOAT)
            feeds[value.name] = np.zeros([d.dim_value for d in kind.shape.dim], dtype)
    return feeds

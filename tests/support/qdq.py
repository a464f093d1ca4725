"""One quantised convolution, written by hand, with every number in reach of a test."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fmdeploy.onnxfile.graph import DQ, Array, Q

OUT, IN = 4, 3
INT8_ZERO = np.zeros((), np.int8)


def conv_file(
    *, scale: float | Array = 0.02, zero: Any = INT8_ZERO, weight_scale: Array | None = None, weight_zero: Any = None,
    axis: int = 0, opset: int = 18, ir: int = 9, between: tuple[NodeProto, ...] = (),
) -> ModelProto:
    """x (1, 3, 8, 8) -> Q -> DQ -> Conv(float weights -> Q -> DQ) -> y (1, 4, 8, 8).

    Args:
        scale: of the activation.
        zero: its zero point, whose type is that of the levels.
        weight_scale: (4,) by default.
        weight_zero: int8 zeros by default.
        axis: of the weight scales.
        opset: of the default domain.
        ir: IR version.
        between: nodes that turn "xd", the dequantised input, into "xe", which the convolution then reads.
    """
    weight_scale = np.full(OUT, 0.02, np.float32) if weight_scale is None else weight_scale
    weight_zero = np.zeros(np.shape(weight_scale), np.int8) if weight_zero is None else weight_zero
    constants = {
        "sx": np.asarray(scale, np.float32), "zx": np.asarray(zero), "sw": np.asarray(weight_scale, np.float32),
        "zw": np.asarray(weight_zero), "w": np.random.default_rng(0).normal(0, 0.5, (OUT, IN, 3, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node(Q, ["x", "sx", "zx"], ["xq"], name="q", axis=1),
        helper.make_node(DQ, ["xq", "sx", "zx"], ["xd"], name="dq", axis=1),
        *between,
        helper.make_node(Q, ["w", "sw", "zw"], ["wq"], name="qw", axis=axis),
        helper.make_node(DQ, ["wq", "sw", "zw"], ["wd"], name="dqw", axis=axis),
        helper.make_node("Conv", ["xe" if between else "xd", "wd"], ["y"], name="conv", pads=[1, 1, 1, 1]),
    ]
    return file_of(nodes, constants, {"x": (1, IN, 8, 8)}, {"y": (1, OUT, 8, 8)}, opset=opset, ir=ir)


def file_of(
    nodes: list[NodeProto], constants: dict[str, Array], inputs: dict[str, tuple[int | None, ...]],
    outputs: dict[str, tuple[int | None, ...]], *, opset: int = 18, ir: int = 9, kind: int = TensorProto.FLOAT,
) -> ModelProto:
    """A model of these nodes, unchecked."""
    def values(shapes: dict[str, tuple[int | None, ...]]) -> list[Any]:
        return [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]

    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", values(inputs), values(outputs), stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def one_node(op_type: str, *inputs: str, constants: dict[str, Array] | None = None, opset: int = 18,
             kind: int = TensorProto.FLOAT, shape: tuple[int | None, ...] = (1, 4, 8, 8), outputs: tuple[str, ...] = ("y",),
             result: int | None = None, **attributes: Any) -> ModelProto:
    """A model of one node, called "n", that reads x and constants; the shape of its result is inferred."""
    import onnx

    node = helper.make_node(op_type, inputs or ["x"], list(outputs), name="n", **attributes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, result or kind, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


def computed_scale() -> ModelProto:
    """A convolution whose activation scale is computed at run time."""
    model = conv_file()
    model.graph.node.insert(0, helper.make_node("ReduceMax", ["x"], ["computed"], name="range", keepdims=0))
    for node in model.graph.node[1:3]:
        node.input[1] = "computed"
    return model

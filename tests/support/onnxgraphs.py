"""Small ONNX graphs, written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, checker, helper, numpy_helper

from fmdeploy.onnxfile.graph import Array

OPSET = 20


def graph_of(
    nodes: Sequence[NodeProto], *, inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]],
    constants: dict[str, Array] | None = None, opset: int = OPSET,
) -> ModelProto:
    """A checked model; inputs and outputs are FP32."""
    def values(shapes: dict[str, tuple[int, ...]]) -> list[ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "g", values(inputs), values(outputs), stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    checker.check_model(model, full_check=True)
    return model


def quantised_convs(
    count: int = 2, *, residual: bool = False, scale: float = 2.0**-5, per_channel: bool = True, seed: int = 0
) -> ModelProto:
    """`count` 3x3 convolutions of 8 channels on 16x16 maps, in TensorRT's dialect; an add over the last where asked."""
    rng = np.random.default_rng(seed)
    zero = np.array(0, np.int8)
    constants: dict[str, Array] = {"scale": np.array(scale, np.float32), "zero": zero}
    nodes: list[NodeProto] = []

    def pair(tensor: str, name: str, scales: str = "scale", zeros: str = "zero", **axis: Any) -> str:
        nodes.append(helper.make_node("QuantizeLinear", [tensor, scales, zeros], [f"{name}_q"], f"{name}/Q", **axis))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", scales, zeros], [f"{name}_dq"], f"{name}/DQ", **axis))
        return f"{name}_dq"

    tensor = "x"
    for k in range(count):
        weight = rng.normal(0, 0.2, (8, 8, 3, 3)).astype(np.float32)
        constants |= {f"conv{k}.weight": weight, f"conv{k}.bias": rng.normal(0, 0.1, 8).astype(np.float32)}
        scales, zeros, axis = "scale", "zero", {}
        if per_channel:
            scales, zeros, axis = f"scale{k}", f"zero{k}", {"axis": 0}
            amax = np.abs(weight).max(axis=(1, 2, 3))
            constants |= {scales: np.nextafter((amax / 127).astype(np.float16), np.float16(1)).astype(np.float32),
                          zeros: np.zeros(8, np.int8)}
        read = pair(tensor, f"act{k}")
        weights = pair(f"conv{k}.weight", f"weight{k}", scales, zeros, **axis)
        nodes.append(helper.make_node("Conv", [read, weights, f"conv{k}.bias"], [f"conv{k}"], f"/conv{k}/Conv",
                                      kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
        tensor = f"conv{k}"
        if residual and k == count - 1:
            nodes.append(helper.make_node("Add", [read, pair(tensor, "branch")], ["sum"], "/Add"))
            tensor = "sum"
        nodes.append(helper.make_node("Relu", [tensor], [f"relu{k}"], f"/relu{k}"))
        tensor = f"relu{k}"
    nodes[-1].output[0] = "y"
    return graph_of(nodes, inputs={"x": (1, 8, 16, 16)}, outputs={"y": (1, 8, 16, 16)}, constants=constants)

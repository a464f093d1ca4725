"""Residual adds as TensorRT wants them: Q/DQ on the skipped tensor, none between a convolution and its add.

ONNX Runtime fuses a convolution only when its result is quantised, so the placement quantises both operands of an add.
TensorRT computes convolution, add and ReLU in one kernel where only the skipped tensor is quantised; an extra pair
behind the convolution keeps the two apart (TensorRT developer guide, "Q/DQ Layer-Placement Recommendations"). The grid
of what stays is the same, and one rounding less is 1.1 dB more on the demo task. TensorRT-RTX compiles both forms to
the same layers (`benchmarks/tensorrt_layers.py`), so its check cannot tell them apart.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from fmdeploy.onnxfile.graph import DQ, Graph, Q

FUSED = ("Conv",)


def drop_branch_pairs(model: ModelProto) -> tuple[str, ...]:
    """Remove, in place, the Q/DQ pair between a convolution and the residual add that alone reads it.

    Where both operands are such convolutions the later one loses its pair: when it runs, the other one is there.

    Returns:
        Names of the convolutions.
    """
    graph = Graph(model)
    order = {node.output[0]: number for number, node in enumerate(model.graph.node)}
    freed: list[str] = []
    for add in graph.nodes("Add"):
        branches = [(slot, conv) for slot, name in enumerate(add.input)
                    if (conv := _branch(graph, name)) is not None]
        if branches and all(_is_quantised(graph, name) for name in add.input):
            slot, conv = max(branches, key=lambda pair: order[pair[1].output[0]])
            add.input[slot] = conv.output[0]
            freed.append(conv.name)
    graph.refresh()
    for op_type in (DQ, Q):
        graph.remove([node for node in graph.nodes(op_type)
                      if not graph.readers[node.output[0]] and node.output[0] not in graph.outputs])
    graph.drop_unused()
    return tuple(freed)


def _is_quantised(graph: Graph, tensor: str) -> bool:
    node = graph.maker.get(tensor)
    return node is not None and node.op_type == DQ


def _branch(graph: Graph, tensor: str) -> NodeProto | None:
    """The quantised convolution whose result, seen through its pair, nobody but the reader of `tensor` uses."""
    dequantize = graph.maker.get(tensor)
    quantize = graph.maker.get(dequantize.input[0]) if dequantize is not None and dequantize.op_type == DQ else None
    conv = graph.maker.get(quantize.input[0]) if quantize is not None and quantize.op_type == Q else None
    if conv is None or conv.op_type not in FUSED or conv.output[0] in graph.outputs:
        return None
    alone = all(len(graph.readers[name]) == 1 for name in (tensor, dequantize.input[0], conv.output[0])
                ) if dequantize is not None else False
    return conv if alone and all(_is_quantised(graph, name) for name in conv.input[:2]) else None

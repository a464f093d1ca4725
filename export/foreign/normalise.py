"""Bring a checked foreign model into the one form that the next steps read, and refuse what has no Q/DQ to lower."""

from __future__ import annotations

from onnx import ModelProto

from fmdeploy.errors import ModelFileError
from fmdeploy.onnxfile import tidy
from fmdeploy.onnxfile.graph import DQ, Graph, Q
from fmdeploy.onnxfile.header import opset_of
from fmdeploy.onnxfile.structure import label

OPERATOR_FORM = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
FIRST_OPSET = 13  # the first in which QuantizeLinear has an axis


def normalise(model: ModelProto) -> tuple[Graph, tuple[str, ...]]:
    """Return an editable copy of `model`, and a line on everything that had to change in it.

    Constants become initialisers, nodes get names, nodes that do nothing go, float16 becomes float32: the dialect for
    the CPU needs that, and both dialects are spelled from one graph.

    Raises:
        ModelFileError: names what cannot be lowered: operator-form quantisation, no quantisation, an old opset.
    """
    copied = ModelProto()
    copied.CopyFrom(model)
    graph = Graph(copied)
    for node in graph.nodes(*OPERATOR_FORM):
        raise ModelFileError("is in the operator form of quantisation, not in Q/DQ form", where=label(node),
                             fix="Write it with quant_format=QuantFormat.QDQ")
    if not graph.nodes(Q, DQ):
        raise ModelFileError("holds no QuantizeLinear and DequantizeLinear: there is nothing to lower",
                             fix="Quantise it first: fmdeploy quantize, or any tool that writes Q/DQ")
    if opset_of(copied) < FIRST_OPSET:
        raise ModelFileError("has an opset in which QuantizeLinear has no axis", expected=f">= {FIRST_OPSET}",
                             found=opset_of(copied), fix="Export with opset 17 to 20")
    tidy.keep_opsets(copied)
    tidy.constants_to_initialisers(graph)
    tidy.drop_stored_inputs(graph)
    notes = ("float16 tensors became float32, inputs and outputs included",) if tidy.to_float32(graph) else ()
    tidy.drop_identities(graph)
    tidy.name_nodes(graph)
    return graph, notes

"""Residual adds in the TensorRT file, and which nodes the placement speaks of."""

from __future__ import annotations

import pytest
from onnx import helper

from fmdeploy.errors import GateError
from fmdeploy.export.branches import drop_branch_pairs
from fmdeploy.export.placed import placed_nodes
from fmdeploy.onnxfile.graph import DQ, Graph, Q, op_counts
from support.onnxgraphs import quantised_convs


def test_the_branch_loses_its_pair_and_the_skipped_tensor_keeps_it() -> None:
    model = quantised_convs(2, residual=True)
    before = op_counts(model)
    assert drop_branch_pairs(model) == ("/conv1/Conv",)
    assert (before[Q] - op_counts(model)[Q], before[DQ] - op_counts(model)[DQ]) == (1, 1)
    graph = Graph(model)
    add = graph.nodes("Add")[0]
    assert [graph.maker[name].op_type for name in add.input] == [DQ, "Conv"]


def test_a_branch_that_others_read_keeps_its_pair() -> None:
    model = quantised_convs(2, residual=True)
    model.graph.node.append(helper.make_node("Relu", ["branch_dq"], ["other"], "/other"))
    model.graph.output.append(helper.make_tensor_value_info("other", 1, (1, 8, 16, 16)))
    assert drop_branch_pairs(model) == ()


def test_without_adds_nothing_changes() -> None:
    model = quantised_convs(2)
    before = model.SerializeToString(deterministic=True)
    assert drop_branch_pairs(model) == ()
    assert op_counts(model) == op_counts(type(model).FromString(before))


def test_placed_modules_are_found_by_their_weights() -> None:
    assert placed_nodes(quantised_convs(3), ["conv0", "conv2"]) == ("/conv0/Conv", "/conv2/Conv")


def test_a_placed_module_without_a_quantised_weight_fails() -> None:
    model = quantised_convs(2)
    conv = next(node for node in model.graph.node if node.name == "/conv1/Conv")
    conv.input[1] = "conv1.weight"
    with pytest.raises(GateError, match="conv1: is placed in INT8, but the exported graph has no quantised weight"):
        placed_nodes(model, ["conv0", "conv1"])

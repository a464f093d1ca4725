"""The builder's log: read in full or refused. A verdict needs two operands of a small type."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fmdeploy.errors import GateError
from fmdeploy.export.tensorrt.builder import NetworkNode, Problem
from fmdeploy.export.tensorrt.compilecheck import judge, require_passed
from fmdeploy.export.tensorrt.isolated import Ended
from fmdeploy.export.tensorrt.layertable import UnreadableLogError, read_layer, read_layers
from fmdeploy.export.tensorrt.verdict import FOLDED, NodeVerdict, precision_of, unmet, verdicts

US = "\x1f"


def tensor(name: str, dtype: str, dims: str = "1,8,16,16") -> str:
    strides = ",".join("1" for _ in dims.split(","))
    return (f"{{ Name: {name}, Dimensions: [{dims}], Strides: [{strides}], StrideOrder: [{strides}], Datatype: {dtype}, "
            "Format: (NHWC) Channel major format }")


def line(name: str, kind: str, inputs: list[str], constants: list[str], outputs: list[str], nodes: list[str]) -> str:
    parts = [f"Name: {name}, LayerType: {kind}"]
    parts += [f"{title}: [ {', '.join(items)}]" for title, items in
              (("Inputs", inputs), ("Constants", constants), ("Outputs", outputs)) if items]
    names = US.join(f"[ONNX Layer: {node}]" for node in nodes)
    return ", ".join([*parts, "TacticName: __myelin_CASK_STUB, StreamId: 0", f"Metadata: {names}"])


CONV = line("/c/Conv_myl0_1", "correlation", [tensor("a", "Int8")],
            [tensor("w", "Int8", "8,8,3,3"), tensor("s", "Float", "1,8,1,1")], [tensor("b", "Half")],
            ["/c/Conv", "/act/DequantizeLinear"])
POINTWISE = line("__myl_MulAddRelu_myl0_2", "kgen", [tensor("b", "Half")], [tensor("k", "Float", "1")],
                 [tensor("y", "Float")], ["/c/Conv", "/relu"])
MESSAGE = "\n".join(["Layers:", CONV, POINTWISE, "", "I/O Tensors:", " Name: x, IOMode: Input"])


def test_a_layer_is_read_with_its_types_and_nodes() -> None:
    conv, pointwise = read_layers([MESSAGE])
    assert (conv.name, conv.kind, conv.nodes) == ("/c/Conv_myl0_1", "correlation", ("/c/Conv", "/act/DequantizeLinear"))
    assert [t.dtype for t in (*conv.inputs, *conv.weights, *conv.outputs)] == ["INT8", "INT8", "FP32", "FP16"]
    assert conv.weights[0].dims == (8, 8, 3, 3)
    assert pointwise.weights[0].is_scalar
    assert pointwise.nodes == ("/c/Conv", "/relu")


@pytest.mark.parametrize("mangle", [
    lambda text: "",
    lambda text: text.replace("Layers:", "Tactics:"),
    lambda text: text.replace("Datatype: Int8", "Format/Datatype: Int8 row major"),
    lambda text: text.replace("Int8", "NewInt8"),
    lambda text: text.replace("Dimensions: [8,8,3,3]", "Dimensions: 8x8x3x3"),
    lambda text: text.replace("Constants: [", "Weights: ["),
    lambda text: text.replace("LayerType: correlation", "Type correlation"),
    lambda text: text.replace(", Format: (NHWC) Channel major format }]", ""),
    lambda text: text[: len(text) // 2],
    lambda text: text.replace("I/O Tensors:", "Something new:"),
    lambda text: "Layers:\n\nI/O Tensors:",
])
def test_a_log_that_changed_is_unreadable(mangle: Callable[[str], str]) -> None:
    with pytest.raises(UnreadableLogError):
        read_layers([mangle(MESSAGE)])


def test_two_operands_make_int8_and_one_is_mixed() -> None:
    conv = read_layer(CONV)
    assert precision_of(conv) == "INT8"
    half_weight = read_layer(CONV.replace(tensor("w", "Int8", "8,8,3,3"), tensor("w", "Half", "8,8,3,3")))
    assert precision_of(half_weight) == "MIXED"
    scalar = read_layer(CONV.replace(tensor("w", "Int8", "8,8,3,3"), tensor("w", "Int8", "1")))
    assert precision_of(scalar) == "MIXED"


def test_two_int8_inputs_of_a_pointwise_kernel_are_no_int8_product() -> None:
    row = line("__myl_AddReshMulSum", "kgen", [tensor("a", "Int8"), tensor("b", "Int8")], [tensor("w", "Half", "8,4")],
               [tensor("y", "Half")], ["/head/Gemm"])
    assert precision_of(read_layer(row)) == "FP16"


def test_the_kernel_decides_not_the_pointwise_layer_that_took_the_bias() -> None:
    layers = read_layers(["\n".join(["Layers:", POINTWISE, CONV, "", "I/O Tensors:"])])
    assert verdicts([NetworkNode("/c/Conv", "CONVOLUTION")], layers) == (
        NodeVerdict("/c/Conv", "CONVOLUTION", "INT8", "/c/Conv_myl0_1"),)


def test_a_node_on_no_layer_was_folded_unless_a_kernel_is_left_over() -> None:
    layers = read_layers([MESSAGE])
    both = [NetworkNode("/c/Conv", "CONVOLUTION"), NetworkNode("/gone/MatMul", "MATRIX_MULTIPLY")]
    assert verdicts(both, layers)[1].precision == FOLDED
    with pytest.raises(UnreadableLogError, match="cannot be matched"):
        verdicts([NetworkNode("/other/Conv", "CONVOLUTION")], layers)
    with pytest.raises(UnreadableLogError, match="no kernel at all"):
        verdicts([NetworkNode("/other/Conv", "CONVOLUTION")], layers[1:])


def test_what_the_placement_says_is_required_by_name() -> None:
    found = [NodeVerdict("/a", "CONVOLUTION", "INT8", "l"), NodeVerdict("/b", "CONVOLUTION", "FP16", "m")]
    assert [(p.node, p.message) for p in unmet(found, ["/a", "/b", "/c"])] == [
        ("/b", "runs in FP16, the placement says INT8"), ("/c", "is no convolution or matrix product of the network")]


def ended(**changes: object) -> Ended:
    result = {"version": "1.7", "parsed": True, "layers": [MESSAGE], "seconds": 0.1, "engine_bytes": 3,
              "nodes": [{"name": "/c/Conv", "kind": "CONVOLUTION"}], **changes}
    return Ended("done", (), b"abc", None, result)


def test_only_a_table_that_was_read_passes() -> None:
    assert judge(ended(), "tensorrt-rtx", ["/c/Conv"]).status == "ok"
    assert judge(ended(layers=[]), "tensorrt-rtx").status == "unreadable"
    assert judge(ended(layers=[MESSAGE.replace("Datatype", "Type")]), "tensorrt-rtx").status == "unreadable"
    report = judge(ended(), "tensorrt-rtx", ["/other"])
    assert report.status == "precision"
    with pytest.raises(GateError, match="fails the TensorRT compile check.*--no-verify-tensorrt"):
        require_passed(report, "model.int8.onnx")


def test_what_never_built_is_rejected_or_failed_with_its_reasons() -> None:
    problem = Problem("parse", "no", "/n", "Foo", "UNSUPPORTED")
    without = Ended("done", (problem,), None, None, {"version": "1", "parsed": False, "engine_bytes": None})
    report = judge(without, "tensorrt-rtx")
    assert (report.status, report.errors) == ("rejected", (problem,))
    assert str(report) == "tensorrt-rtx 1 rejected: parse: UNSUPPORTED Foo /n: no"
    assert judge(Ended("done", (problem,), None, None, {"parsed": True}), "tensorrt-rtx").status == "build-failed"
    assert judge(Ended("timeout", (problem,)), "tensorrt-rtx").status == "timeout"

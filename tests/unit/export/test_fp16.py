"""FP16 typing: what becomes FP16, what the probe keeps FP32, and that the grid of numbers never moves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference
from torch import Tensor, nn

from fmdeploy.errors import ModelFileError
from fmdeploy.evaluate.sqnr import sqnr_db
from fmdeploy.export.dialects import quantised_weight
from fmdeploy.export.fp16 import half_precision, require_exact_scale, rounding_made_explicit
from fmdeploy.export.fp16probe import LIMIT, probe
from fmdeploy.export.onnx import export_onnx
from fmdeploy.export.variants import float_module
from fmdeploy.onnxfile.graph import DQ, Array, Graph, Q, attribute, op_counts
from fmdeploy.onnxfile.session import run_model
from support.onnxgraphs import graph_of, quantised_convs
from support.quantize_nets import image_net, samples_of, vit

ROW = {"x": np.linspace(-3, 3, 8, dtype=np.float32)[None]}


def chain(*ops: tuple[str, list[str], str], constants: dict[str, Array] | None = None) -> ModelProto:
    """Nodes named by their output, from x (1, 8) to y (1, 8)."""
    nodes = [helper.make_node(op, inputs, [output], f"/{output}") for op, inputs, output in ops]
    return graph_of(nodes, inputs={"x": (1, 8)}, outputs={"y": (1, 8)}, constants=constants)


def types_of(model: ModelProto) -> dict[str, int]:
    """Type of every tensor that a node makes."""
    known = shape_inference.infer_shapes(model, strict_mode=True).graph
    return {v.name: v.type.tensor_type.elem_type for v in (*known.value_info, *known.output)}


def as_typed(model: ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    return run_model(rounding_made_explicit(model).SerializeToString(), feeds, optimise=False)


def test_inputs_and_outputs_stay_fp32_and_the_rest_is_half() -> None:
    model = chain(("Mul", ["x", "two"], "a"), ("Relu", ["a"], "y"), constants={"two": np.array(2, np.float32)})
    half = half_precision(model)
    assert op_counts(half) == Counter(Cast=2, Mul=1, Relu=1)
    assert types_of(half)["a"] == TensorProto.FLOAT16
    assert {v.type.tensor_type.elem_type for v in (*half.graph.input, *half.graph.output)} == {TensorProto.FLOAT}
    assert [t.data_type for t in half.graph.initializer] == [TensorProto.FLOAT16]


def test_an_output_that_another_node_reads_too_is_made_once() -> None:
    """The reader stays FP32: it must not read what is cast only behind it."""
    model = graph_of([helper.make_node("Relu", ["x"], ["a"], "/a"), helper.make_node("Exp", ["a"], ["y"], "/y")],
                     inputs={"x": (1, 8)}, outputs={"a": (1, 8), "y": (1, 8)})
    half = half_precision(model, keep={"/y"})
    found = as_typed(half, ROW)
    assert np.allclose(found["a"], np.maximum(ROW["x"], 0), atol=1e-3)
    assert np.allclose(found["y"], np.exp(np.maximum(ROW["x"], 0)), rtol=1e-2)
    names = [node.name for node in half.graph.node]
    assert len(set(names)) == len(names)


def test_two_outputs_of_one_node_are_both_given() -> None:
    node = helper.make_node("Split", ["r"], ["a", "y"], "/s", axis=1, num_outputs=2)
    model = graph_of([helper.make_node("Relu", ["x"], ["r"], "/r"), node], inputs={"x": (1, 8)},
                     outputs={"a": (1, 4), "y": (1, 4)})
    found = as_typed(half_precision(model), ROW)
    assert np.allclose(np.concatenate([found["a"], found["y"]], 1), np.maximum(ROW["x"], 0), atol=1e-3)


def test_a_cast_is_retyped_whatever_its_other_attributes() -> None:
    nodes = [helper.make_node("Cast", ["x"], ["i"], "/i", to=TensorProto.INT32),
             helper.make_node("Cast", ["i"], ["f"], "/f", saturate=1, to=TensorProto.FLOAT),
             helper.make_node("Relu", ["f"], ["y"], "/y")]
    half = half_precision(graph_of(nodes, inputs={"x": (1, 8)}, outputs={"y": (1, 8)}))
    cast = next(node for node in half.graph.node if node.name == "/f")
    assert (attribute(cast, "to"), attribute(cast, "saturate")) == (TensorProto.FLOAT16, 1)
    assert np.array_equal(as_typed(half, ROW)["y"], np.maximum(np.trunc(ROW["x"]), 0))


def test_an_input_that_is_fp32_in_any_node_is_cast_back() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["boxes"], "/r"),
             helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "iou"], ["i"], "/nms"),
             helper.make_node("Cast", ["i"], ["y"], "/y", to=TensorProto.FLOAT)]
    model = graph_of(nodes, inputs={"x": (1, 2, 4)}, outputs={"y": (2, 3)}, constants={
        "scores": np.ones((1, 1, 2), np.float32), "most": np.array([2]), "iou": np.array([0.5], np.float32)})
    boxes = np.array([[[0, 0, 1, 1], [2, 2, 3, 3]]], np.float32)
    found = run_model(half_precision(model).SerializeToString(), {"x": boxes}, optimise=False)["y"]
    assert found.tolist() == [[0, 0, 0], [0, 0, 1]]


def test_layernorm_and_gelu_stay_one_operator_each(tmp_path: Path) -> None:
    net, io = vit()
    model = export_onnx(float_module(net, io), io, tmp_path / "m.onnx")
    counts = op_counts(half_precision(model))
    assert (counts["LayerNormalization"], counts["Gelu"], counts["Erf"], counts["Sqrt"]) == (3, 1, 0, 0)


def test_an_overflow_between_two_kept_nodes_never_passes_through_half() -> None:
    """ONNX Runtime's own converter casts there: this test says why we have our own."""
    model = chain(("Mul", ["x", "big"], "a"), ("Div", ["a", "big"], "b"), ("Relu", ["b"], "y"),
                  constants={"big": np.array(60000, np.float32)})
    kept = {row.node for row in probe(model, ROW)}
    assert kept == {"/a", "/b"}
    assert np.allclose(as_typed(half_precision(model, keep=kept), ROW)["y"], np.maximum(ROW["x"], 0), atol=1e-3)
    assert not np.isfinite(as_typed(half_precision(model), ROW)["y"]).all()  # the control

    from onnxruntime.transformers.float16 import convert_float_to_float16

    theirs = convert_float_to_float16(model, keep_io_types=True, node_block_list=["/a", "/b"])
    assert op_counts(theirs)["Cast"] > 4, "it no longer casts between blocked nodes: use it"


def test_onnxruntime_on_the_cpu_hides_an_overflow_that_the_explicit_form_shows() -> None:
    model = chain(("Mul", ["x", "big"], "a"), ("Div", ["a", "big"], "y"), constants={"big": np.array(60000, np.float32)})
    half = half_precision(model)
    hidden = run_model(half.SerializeToString(), ROW, optimise=False)["y"]
    assert np.isfinite(hidden).all(), "ONNX Runtime keeps FP16 types now: run the files as they are"
    assert not np.isfinite(as_typed(half, ROW)["y"]).all()


@pytest.mark.parametrize(("ops", "constants", "node", "why"), [
    ([("Mul", ["x", "c"], "a"), ("Mul", ["a", "d"], "y")], {"c": 6000.0, "d": 1e-3}, "/a", "largest value"),
    ([("Add", ["x", "c"], "a"), ("Relu", ["a"], "y")], {"c": 1e5}, "/a", "largest value"),
    ([("Mul", ["x", "c"], "a"), ("Mul", ["a", "d"], "y")], {"c": 1e-7, "d": 1e7}, "/a", "dB kept by FP16"),
    ([("Add", ["x", "c"], "a"), ("Relu", ["a"], "y")], {"c": 1e-9}, "/a", "constant that becomes 0"),
    ([("Softplus", ["x"], "a"), ("Relu", ["a"], "y")], {}, None, ""),
    ([("Relu", ["x"], "a"), ("Softmax", ["a"], "y")], {}, None, ""),
])
def test_the_probe_names_the_node_and_the_reason(
    ops: list[tuple[str, list[str], str]], constants: dict[str, float], node: str | None, why: str
) -> None:
    model = chain(*ops, constants={name: np.array(value, np.float32) for name, value in constants.items()})
    rows = probe(model, ROW)
    assert [row.node for row in rows][:1] == ([node] if node else [])
    assert not rows or why in rows[0].why


@pytest.mark.parametrize(("op", "size", "kept"), [
    ("GlobalAveragePool", 8, False), ("GlobalAveragePool", 64, True), ("GlobalMaxPool", 64, False)])
def test_a_sum_inside_a_node_counts(op: str, size: int, kept: bool) -> None:
    """A mean of 5 over 64 x 64 values is the sum 20480: above the limit, though no tensor shows it."""
    model = graph_of([helper.make_node(op, ["x"], ["y"], "/pool")], inputs={"x": (1, 2, size, size)},
                     outputs={"y": (1, 2, 1, 1)})
    rows = probe(model, {"x": np.full((2, 2, size, size), 5, np.float32)})
    assert bool(rows) is kept
    assert not kept or rows[0].value == pytest.approx(5 * 64 * 64)
    assert LIMIT == 65504 / 4


@pytest.mark.parametrize(("op", "shape", "inside"), [
    ("GlobalAveragePool", (1, 2, 4096), 5 * 4096), ("GlobalAveragePool", (1, 2, 16, 16, 16), 5 * 4096),
    ("InstanceNormalization", (1, 2, 1024), 25 * 1024), ("ReduceMean", (1, 2, 4096), 5 * 2 * 4096)])
def test_sums_inside_count_at_any_rank(op: str, shape: tuple[int, ...], inside: float) -> None:
    """GroupNorm is an InstanceNormalization of rank 3 in ONNX; a ReduceMean without axes sums everything."""
    more = {"g": np.ones(2, np.float32), "b": np.zeros(2, np.float32)} if op == "InstanceNormalization" else {}
    out = {"GlobalAveragePool": (*shape[:2], *[1] * (len(shape) - 2)), "ReduceMean": (1, 1, 1)}.get(op, shape)
    model = graph_of([helper.make_node(op, ["x", *more], ["y"], "/sum")], inputs={"x": shape}, outputs={"y": out},
                     constants=more)
    assert probe(model, {"x": np.full(shape, 5, np.float32)})[0].value == pytest.approx(inside)


def test_a_decomposed_variance_stays_fp32_and_the_fused_one_does_not() -> None:
    """Squares of 200 overflow FP16; LayerNormalization sums in FP32 by its own definition."""
    rng = np.random.default_rng(0)
    feeds = {"x": rng.normal(0, 200, (4, 8)).astype(np.float32)}
    raw = [helper.make_node("ReduceMean", ["x", "axes"], ["m"], "/m"), helper.make_node("Sub", ["x", "m"], ["d"], "/d"),
           helper.make_node("Pow", ["d", "two"], ["p"], "/p"), helper.make_node("ReduceMean", ["p", "axes"], ["v"], "/v"),
           helper.make_node("Sqrt", ["v"], ["s"], "/s"), helper.make_node("Div", ["d", "s"], ["y"], "/y")]
    decomposed = graph_of(raw, inputs={"x": (1, 8)}, outputs={"y": (1, 8)},
                          constants={"axes": np.array([1]), "two": np.array(2, np.float32)})
    assert {"/p", "/v", "/s"} <= {row.node for row in probe(decomposed, feeds)}
    fused = graph_of([helper.make_node("LayerNormalization", ["x", "g", "b"], ["y"], "/ln")], inputs={"x": (1, 8)},
                     outputs={"y": (1, 8)}, constants={"g": np.ones(8, np.float32), "b": np.zeros(8, np.float32)})
    assert probe(fused, feeds) == ()


def test_chunks_change_nothing(tmp_path: Path) -> None:
    net, io = image_net(_Wide())
    model = export_onnx(float_module(net, io), io, tmp_path / "m.onnx")
    inputs = samples_of(io).inputs
    rows = probe(model, inputs)
    assert rows
    assert rows == probe(model, inputs, chunk_bytes=1)


class _Wide(nn.Module):
    """Its middle tensor is near the largest FP16 number."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.two((self.one(x_BCHW) * 3e5).relu() / 3e5)
        y_BC: Tensor = self.head(x_BCHW.mean((2, 3)))
        return y_BC


def test_scales_keep_their_value_and_weights_their_level() -> None:
    model = quantised_convs(3)
    half = half_precision(model)
    before, after = Graph(model), Graph(half)
    for old, new in zip(before.nodes(Q, DQ), after.nodes(Q, DQ), strict=True):
        scale = after.constants[new.input[1]]
        assert np.array_equal(before.constants[old.input[1]], scale.astype(np.float32))
    weights = [(o, n) for o, n in zip(before.nodes(Q), after.nodes(Q), strict=True) if o.input[0] in before.constants]
    assert len(weights) == 3
    for old, new in weights:
        assert after.constants[new.input[0]].dtype == np.float16
        assert np.array_equal(quantised_weight(before, old), _levels_in_half(after, new))


def _levels_in_half(graph: Graph, node: NodeProto) -> Array:
    """What an FP16 QuantizeLinear computes: the division itself in FP16, which is the worst that a kernel may do."""
    weight, scale = graph.constants[node.input[0]], graph.constants[node.input[1]]
    shape = [1] * weight.ndim
    shape[attribute(node, "axis", 1)] = -1
    levels: Array = np.clip(np.rint(weight / scale.reshape(shape)), -128, 127).astype(np.int8)
    return levels


def test_the_first_quantizer_reads_the_fp32_input_itself() -> None:
    half = half_precision(quantised_convs(2))
    first = next(node for node in half.graph.node if node.op_type == Q and node.input[0] == "x")
    assert Graph(half).constants[first.input[1]].dtype == np.float32
    assert op_counts(half)["Cast"] == 1  # only before the output


def test_int8_typed_half_computes_what_fp32_does() -> None:
    model = quantised_convs(3)
    feeds = {"x": np.random.default_rng(1).normal(0, 1, (1, 8, 16, 16)).astype(np.float32)}
    exact = run_model(model.SerializeToString(), feeds, optimise=False)["y"]
    assert sqnr_db(exact, as_typed(half_precision(model), feeds)["y"]) > 35


def test_a_scale_that_half_cannot_hold_is_refused() -> None:
    with pytest.raises(ModelFileError, match="scale is no FP16 number.*--rest fp32"):
        half_precision(quantised_convs(1, scale=0.1))
    for bad in (0.1, 1e-9, 1e6):
        with pytest.raises(ModelFileError):
            require_exact_scale(np.array(bad, np.float32), "s")
    require_exact_scale(np.array(2.0**-24, np.float32), "the smallest subnormal is exact")


def test_pairs_need_an_opset_that_has_half_scales() -> None:
    model = quantised_convs(1)
    model.opset_import[0].version = 18
    with pytest.raises(ModelFileError, match="no FP16 form in this opset"):
        half_precision(model)


def test_a_kept_convolution_reads_fp32_pairs_without_a_cast_in_between() -> None:
    """A cast between DequantizeLinear and Conv would break the pattern that TensorRT looks for."""
    half = half_precision(quantised_convs(2), keep={"/conv1/Conv"})
    graph = Graph(half)
    conv = next(node for node in half.graph.node if node.name == "/conv1/Conv")
    assert [graph.maker[name].op_type for name in conv.input[:2]] == [DQ, DQ]
    assert types_of(half)["conv1"] == TensorProto.FLOAT


def test_resize_keeps_its_scales_in_fp32() -> None:
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], "/up", mode="nearest")
    model = graph_of([node], inputs={"x": (1, 1, 4, 4)}, outputs={"y": (1, 1, 8, 8)},
                     constants={"scales": np.array([1, 1, 2, 2], np.float32)})
    half = half_precision(model)
    assert [numpy_helper.to_array(t).dtype for t in half.graph.initializer] == [np.float32]
    assert run_model(half.SerializeToString(), {"x": np.ones((1, 1, 4, 4), np.float32)})["y"].shape == (1, 1, 8, 8)

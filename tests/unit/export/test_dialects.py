"""One grid, two dialects: the same numbers, and every operation fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from fmdeploy.cpu import Isa, this_cpu
from fmdeploy.errors import ModelFileError
from fmdeploy.evaluate.sqnr import sqnr_db
from fmdeploy.export import dialects
from fmdeploy.export.dialects import cpu_dialect, is_non_negative, quantised_weight, spell_for_cpu
from fmdeploy.export.fused import fused_ops
from fmdeploy.export.isa import narrow_weights, require_exact, saturating_layers
from fmdeploy.export.onnx import export_onnx
from fmdeploy.iospec import IOSpec
from fmdeploy.onnxfile.graph import DQ, Graph, Q, save_model
from fmdeploy.onnxfile.session import ort_predictor, run_model
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.ptq import ptq
from support.onnxgraphs import quantised_convs
from support.qdq import file_of
from support.quantize_nets import NETS, concat, samples_of

# INT8 convolutions and residual adds. What a ViT's patch convolution makes goes to the residual stream, in float.
CASES = {"bev": (11, 5), "residual": (2, 1), "concat": (3, 0), "vit": (0, 0)}
Files = tuple[str, IOSpec, Path, ModelProto]


@pytest.fixture(scope="module", params=CASES)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Both dialects of one quantised net."""
    torch.manual_seed(0)
    net, io = NETS[request.param]()
    folder = tmp_path_factory.mktemp("dialects")
    model = export_onnx(ptq(net, io, samples_of(io)).module, io, folder / "int8.onnx")
    save_model(cpu_dialect(model), folder / "x86.onnx")
    return request.param, io, folder, model


def _agreement_db(net: nn.Module, io: IOSpec, folder: Path, *, headroom: float, signed: bool) -> float:
    """TensorRT dialect against the CPU's, both as written, with activation ranges `headroom` times the calibrated ones."""
    quantised = ptq(net, io, samples_of(io)).module
    ranges = {n: a * headroom if n.endswith("input_quantizer") else a for n, a in modelopt.ranges(quantised).items()}
    modelopt.set_ranges(quantised, ranges)
    model = export_onnx(quantised, io, folder / "int8.onnx")
    save_model(cpu_dialect(model, signed=signed), folder / "cpu.onnx")
    inputs = samples_of(io).inputs
    one, other = (ort_predictor(folder / name, io, optimise=False)(inputs) for name in ("int8.onnx", "cpu.onnx"))
    return min(sqnr_db(one[name], other[name]) for name in one)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_moving_zero_points_is_exact_where_nothing_is_clipped(case: str, signed: bool, tmp_path: Path) -> None:
    net, io = NETS[case]()
    assert _agreement_db(net, io, tmp_path, headroom=1.5, signed=signed) == np.inf


def test_zero_point_in_the_middle_is_exact_even_where_values_are_clipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialects, "NON_NEGATIVE", frozenset())
    net, io = concat()
    assert _agreement_db(net, io, tmp_path, headroom=0.5, signed=False) == np.inf


def test_behind_a_relu_only_values_above_the_range_differ(tmp_path: Path) -> None:
    net, io = concat()
    assert 5 < _agreement_db(net, io, tmp_path, headroom=0.5, signed=False) < 60


def test_what_runs_stays_close_to_what_is_written(files: Files) -> None:
    _, io, folder, _ = files
    inputs = samples_of(io, seed=4).inputs
    written, ran = (ort_predictor(folder / f, io, optimise=o)(inputs) for f, o in (("int8.onnx", False), ("x86.onnx", True)))
    worst = min(sqnr_db(written[name], ran[name]) for name in written)
    print(f"{files[0]}: int8 against int8-cpu {worst:.1f} dB")
    assert worst >= 30


def test_every_quantised_conv_and_add_is_fused(files: Files) -> None:
    case, _, folder, _ = files
    found = fused_ops(folder / "x86.onnx")
    assert (found.int8_convs, found.int8_adds) == CASES[case], found.counts
    assert found.float_convs <= 1, "at most the head"


def test_tensorrt_dialect_is_not_fused_by_onnxruntime(files: Files) -> None:
    """Why there are two dialects. When this fails, ONNX Runtime has learned to: measure again, and drop one."""
    case, _, folder, _ = files
    if case == "bev":
        found = fused_ops(folder / "int8.onnx")
        assert found.int8_convs < 13
        assert found.int8_adds == 0


def test_weights_are_int8_initialisers_behind_a_dq(files: Files) -> None:
    graph = Graph(cpu_dialect(files[3]))
    assert not any(node.input[0] in graph.constants for node in graph.nodes(Q))
    weights = [node for node in graph.nodes(DQ) if node.input[0] in graph.constants]
    assert weights
    assert all(graph.constants[node.input[0]].dtype == np.int8 for node in weights)
    assert all(not graph.constants[node.input[2]].any() for node in weights)


def test_zero_points_say_whether_a_tensor_can_be_negative(files: Files) -> None:
    for signed, kind, values in ((False, np.uint8, {0, 128}), (True, np.int8, {-128, 0})):
        graph = Graph(cpu_dialect(files[3], signed=signed))
        zeros = [graph.constants[node.input[2]] for node in graph.nodes(Q)]
        assert {z.dtype for z in zeros} == {np.dtype(kind)}
        assert {int(z) for z in zeros} <= values


def test_the_source_model_is_not_changed(files: Files) -> None:
    before = files[3].SerializeToString()
    cpu_dialect(files[3])
    assert files[3].SerializeToString() == before


def test_a_model_in_another_dialect_is_refused(files: Files) -> None:
    with pytest.raises(ModelFileError, match=r"is not in the TensorRT dialect.*expected int8 zero point 0"):
        cpu_dialect(cpu_dialect(files[3]))


def _tiny(*nodes: NodeProto) -> Graph:
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y")]
    low = numpy_helper.from_array(np.array(0, np.float32), "low")
    return Graph(helper.make_model(helper.make_graph(list(nodes), "g", value[:1], value[1:], [low])))


def test_non_negative_is_proven_not_guessed() -> None:
    relu, add = helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Add", ["r", "x"], ["y"])
    assert is_non_negative(_tiny(relu, add), "r", ())
    assert not is_non_negative(_tiny(relu, add), "y", ())
    assert is_non_negative(_tiny(relu, add), "y", ("x",))
    assert not is_non_negative(_tiny(helper.make_node("Sub", ["x", "x"], ["y"])), "y", ("x",))
    assert is_non_negative(_tiny(helper.make_node("Clip", ["x", "low"], ["y"])), "y", ())
    assert not is_non_negative(_tiny(helper.make_node("Clip", ["x"], ["y"])), "y", ())


def test_sums_of_sums_are_walked_once_each_and_however_deep() -> None:
    """2^2000 paths lead from the last sum to the first."""
    sums = [helper.make_node("Add", [f"a{k}", f"a{k}"], [f"a{k + 1}"]) for k in range(2000)]
    graph = _tiny(helper.make_node("Relu", ["x"], ["a0"]), *sums)
    assert is_non_negative(graph, "a2000", ())
    assert not is_non_negative(_tiny(helper.make_node("Neg", ["x"], ["a0"]), *sums), "a2000", ())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), per_channel=st.booleans(), spread=st.sampled_from([0.01, 1.0, 100.0]))
def test_folded_weights_equal_what_onnxruntime_would_quantise(seed: int, per_channel: bool, spread: float) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=(4, 3, 2, 2)) * spread).astype(np.float32)
    amax = np.abs(weight).max(axis=(1, 2, 3)) if per_channel else np.abs(weight).max()
    scale = (amax / 127).astype(np.float32)
    zero = np.zeros(scale.shape, np.int8)
    node = helper.make_node(Q, ["w", "s", "z"], ["q"], axis=0)
    output = helper.make_tensor_value_info("q", TensorProto.INT8, list(weight.shape))
    tensors = [numpy_helper.from_array(a, n) for a, n in ((weight, "w"), (scale, "s"), (zero, "z"))]
    model = helper.make_model(helper.make_graph([node], "g", [], [output], tensors), ir_version=8,
                              opset_imports=[helper.make_opsetid("", 18)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {})[0], quantised_weight(Graph(model), node))


def test_a_layer_that_reads_a_signed_tensor_may_saturate_without_vnni(files: Files) -> None:
    positive = [spec.name for spec in files[1].inputs]
    found = saturating_layers(cpu_dialect(files[3], non_negative=positive))
    everything = saturating_layers(cpu_dialect(files[3]))
    if files[0] == "vit":
        assert found, "LayerNorm outputs are signed"
    else:
        assert found == ()
        assert len(everything) == 1, "with inputs of unknown sign, the first conv"
    assert saturating_layers(cpu_dialect(files[3], signed=True)) == ()


@pytest.mark.parametrize(("flags", "features", "exact"), [
    ("fma avx2", ("avx2",), False), ("avx2 avx_vnni", ("avx_vnni", "avx2"), True), ("avx512_vnni", ("avx512_vnni",), True),
    ("avx512bw avx2", ("avx512bw", "avx2"), False), ("sse", (), False), ("amx_int8", ("amx_int8",), True),
])
def test_x86_features_are_read_from_cpuinfo(
    flags: str, features: tuple[str, ...], exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags} mmx\n")
    assert this_cpu(tmp_path / "cpuinfo") == Isa("x86_64", exact, features)
    assert this_cpu(tmp_path / "none") == Isa("x86_64", False)


def test_arm_multiplies_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    (tmp_path / "cpuinfo").write_text("Features\t: fp asimd asimddp i8mm bf16\n")  # an Orin has asimddp, not i8mm
    assert this_cpu(tmp_path / "cpuinfo") == Isa("aarch64", True, ("i8mm", "asimddp"))
    assert str(this_cpu(tmp_path / "cpuinfo")) == "aarch64, i8mm, asimddp: exact 8-bit products"
    assert this_cpu(tmp_path / "none") == Isa("aarch64", True)


def _matmul(weight: np.ndarray[Any, Any], axis: int) -> ModelProto:
    """A layer that reads a signed uint8 tensor, with int8 weights (in, out) scaled along `axis`."""
    scales = np.ones(weight.shape[axis], np.float32)
    tensors = {"s": np.float32(0.1), "z": np.uint8(128), "w": weight, "ws": scales, "wz": np.zeros(scales.shape, np.int8)}
    nodes = [helper.make_node(Q, ["x", "s", "z"], ["q"]), helper.make_node(DQ, ["q", "s", "z"], ["a"]),
             helper.make_node(DQ, ["w", "ws", "wz"], ["b"], axis=axis), helper.make_node("MatMul", ["a", "b"], ["y"], name="mm")]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, size]) for n, size in (("x", 2), ("y", 3))]
    initial = [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    return helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], initial),
                             opset_imports=[helper.make_opsetid("", 18)])


def test_pairs_that_saturate_are_looked_for_along_the_output_channels() -> None:
    """Two large weights meet in a sum only where they belong to one output: a column of (in, out), not a row."""
    row, column = np.array([[127, 127, 0], [0, 0, 0]], np.int8), np.array([[127, 0, 0], [127, 0, 0]], np.int8)
    assert saturating_layers(_matmul(column, axis=1)) == ("mm",)
    assert saturating_layers(_matmul(row, axis=1)) == (), "one weight a column: 127 * 255 fits"
    assert saturating_layers(_matmul(row, axis=0)) == ("mm",)


def test_narrow_weights_fit_on_any_x86(tmp_path: Path) -> None:
    """7 bits: 255 * 64 * 2 < 2^15. Only the layers in question change, and the file says almost the same."""
    column = np.array([[127, 127, 0], [-128, 127, 3]], np.int8)
    model = _matmul(column, axis=1)
    assert saturating_layers(model) == ("mm",)
    assert narrow_weights(model) == ("mm",)
    assert saturating_layers(model) == ()
    graph = Graph(model)
    dequantize = graph.maker["b"]
    assert graph.constants[dequantize.input[0]].tolist() == [[63, 63, 0], [-64, 63, 2]]
    assert graph.constants[dequantize.input[1]].tolist() == [2, 2, 2]
    assert narrow_weights(model) == (), "once is enough"


def test_cpu_kinds_of_one_model() -> None:
    model = quantised_convs(2)
    exact, narrow, arm = (spell_for_cpu(model, kind) for kind in ("x86-64", "x86-64-avx2", "arm64"))
    assert exact.saturating == narrow.narrowed != ()
    assert (exact.narrowed, narrow.saturating, arm.saturating, arm.narrowed) == ((), (), (), ())
    kinds = {kind: {zero.dtype for node in Graph(spelled.model).nodes(Q)
                    if (zero := Graph(spelled.model).constants[node.input[2]]) is not None}
             for kind, spelled in (("x86", exact), ("arm", arm))}
    assert kinds == {"x86": {np.dtype(np.uint8)}, "arm": {np.dtype(np.int8)}}
    feeds = {"x": np.random.default_rng(0).normal(0, 0.5, (1, 8, 16, 16)).astype(np.float32)}
    wanted, found = (run_model(m.model.SerializeToString(), feeds, optimise=False) for m in (exact, narrow))
    ratio = min(sqnr_db(wanted[name], found[name]) for name in wanted)
    print(f"7-bit weights: {ratio:.1f} dB")
    assert 20 < ratio < 60


def test_the_bias_of_a_narrowed_product_keeps_its_value() -> None:
    """ONNX Runtime takes the scale of an INT32 bias from the factors, whatever its DequantizeLinear says."""
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1, (4, 8)).astype(np.float32)
    nodes = [helper.make_node(Q, ["x", "sx", "zx"], ["xq"]), helper.make_node(DQ, ["xq", "sx", "zx"], ["xd"]),
             helper.make_node(Q, ["w", "sw", "zw"], ["wq"], axis=0), helper.make_node(DQ, ["wq", "sw", "zw"], ["wd"], axis=0),
             helper.make_node("Gemm", ["xd", "wd", "b"], ["y"], name="product", transB=1)]
    model = file_of(nodes, {
        "sx": np.array(0.02, np.float32), "zx": np.array(0, np.int8), "w": weight,
        "sw": np.abs(weight).max(1) / np.float32(127),
        "zw": np.zeros(4, np.int8), "b": np.array([10, -20, 30, -40], np.float32)}, {"x": (1, 8)}, {"y": (1, 4)})
    spelled = spell_for_cpu(model, "x86-64-avx2")
    assert spelled.narrowed == ("product",)
    feeds = {"x": rng.normal(0, 0.5, (1, 8)).astype(np.float32)}
    wanted = run_model(model.SerializeToString(), feeds, optimise=False)["y"]
    found = run_model(spelled.model.SerializeToString(), feeds)["y"]
    assert np.abs(found - wanted).max() < 0.1


def test_a_saturating_file_is_not_measured_without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmdeploy.export.isa.this_cpu", lambda: Isa("x86_64", False, ("avx2",)))
    require_exact(())
    with pytest.raises(ModelFileError, match=r"mm: 8-bit products .* avx2: saturating .*--cpu x86-64-avx2"):
        require_exact(("mm",))


def test_linear_layers_run_in_integers_though_their_results_stay_float(tmp_path: Path) -> None:
    """A MatMul with a float bias behind it would become a float Gemm: ViT-S takes four times as long.

    When the second half fails, ONNX Runtime has learned to keep such a Gemm integer: drop `_spell_biases`.
    """
    rng = np.random.default_rng(0)
    constants = {"s": np.float32(0.05), "z": np.int8(0), "w": rng.normal(0, 0.1, (8, 6)).astype(np.float32),
                 "v": rng.normal(0, 0.1, (6, 6)).astype(np.float32), "b": rng.normal(0, 1, 6).astype(np.float32)}

    def quantised(tensor: str) -> list[NodeProto]:
        return [helper.make_node(Q, [tensor, "s", "z"], [f"{tensor}q"], name=f"{tensor}/Q"),
                helper.make_node(DQ, [f"{tensor}q", "s", "z"], [f"{tensor}d"], name=f"{tensor}/DQ")]

    nodes = [*quantised("x"), *quantised("w"), helper.make_node("MatMul", ["xd", "wd"], ["m"], name="mm"),
             helper.make_node("Add", ["m", "b"], ["a"], name="add"), helper.make_node("ReduceMean", ["a"], ["r"],
                                                                                   name="mean", axes=[1], keepdims=0),
             *quantised("r"), *quantised("v"), helper.make_node("Gemm", ["rd", "vd", "b"], ["y"], name="head")]
    model = file_of(nodes, {k: np.asarray(v) for k, v in constants.items()}, {"x": (1, 5, 8)}, {"y": (1, 6)}, opset=17)
    for name, spelled in (("int8", model), ("cpu", cpu_dialect(model))):
        save_model(spelled, tmp_path / f"{name}.onnx")
    assert fused_ops(tmp_path / "cpu.onnx").counts.keys() >= {"com.microsoft.MatMulIntegerToFloat", "com.microsoft.QGemm"}
    assert fused_ops(tmp_path / "int8.onnx").float_matmuls == 2
    feeds = {"x": rng.normal(0, 1, (1, 5, 8)).astype(np.float32)}
    wanted, found = (run_model(tmp_path / f, feeds, optimise=o) for f, o in (("int8.onnx", False), ("cpu.onnx", True)))
    assert sqnr_db(wanted["y"], found["y"]) > 50

"""The real TensorRT-RTX parser and compiler on small graphs: verdicts, and controls that must fail."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper

from fmdeploy.errors import GateError, MissingDependencyError, ModelFileError
from fmdeploy.evaluate.sqnr import sqnr_db
from fmdeploy.export.branches import drop_branch_pairs
from fmdeploy.export.dialects import quantised_weight
from fmdeploy.export.fp16 import half_precision, rounding_made_explicit
from fmdeploy.export.tensorrt.builder import Built, Options, _limit_workspace, network_flags
from fmdeploy.export.tensorrt.compilecheck import CompileReport, compile_check, wanted_version
from fmdeploy.export.variants import write_variants
from fmdeploy.export.verification import verify_tensorrt
from fmdeploy.onnxfile.graph import DQ, Graph
from fmdeploy.onnxfile.session import run_model
from fmdeploy.quantize.ptq import ptq
from fmdeploy.runtime.backends.tensorrt_api import MODULES, installed
from support.onnxgraphs import graph_of, quantised_convs
from support.quantize_nets import NETS, samples_of

needs_compiler = pytest.mark.skipif(not installed("tensorrt-rtx"), reason="needs the extra [trt-rtx]")
CONVS = ("/conv0/Conv", "/conv1/Conv", "/conv2/Conv")


def check(model: ModelProto, tmp_path: Path, **options: Any) -> CompileReport:
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return compile_check(path, **options)


@needs_compiler
@pytest.mark.parametrize("half", [False, True])
def test_quantised_convolutions_run_in_int8(half: bool, tmp_path: Path) -> None:
    model = quantised_convs(3, residual=True)
    drop_branch_pairs(model)
    report = check(half_precision(model) if half else model, tmp_path, require_int8=CONVS)
    assert report.status == "ok", report
    assert report.counts == {"INT8": 3}
    assert report.version == "1.7.1.116"
    assert report.engine_bytes
    assert "Int8" not in str(report.to_json()["layers"])  # one vocabulary: INT8, FP16, FP32


@needs_compiler
@pytest.mark.parametrize("slot", [0, 1], ids=["activation", "weight"])
def test_one_pair_removed_is_exactly_one_float_convolution(slot: int, tmp_path: Path) -> None:
    """The negative control: the check sees what it claims to see."""
    model = quantised_convs(3)
    graph = Graph(model)
    conv = next(node for node in model.graph.node if node.name == "/conv1/Conv")
    quantize = graph.maker[graph.maker[conv.input[slot]].input[0]]
    conv.input[slot] = quantize.input[0]
    report = check(model, tmp_path, require_int8=CONVS)
    assert report.status == "precision"
    assert [(p.node, p.message) for p in report.errors] == [("/conv1/Conv", "runs in FP32, the placement says INT8")]
    assert report.counts == {"FP32": 1, "INT8": 2}


@needs_compiler
@pytest.mark.parametrize("kept", ["/conv0/Conv", "/conv1/Conv"])
def test_a_kept_convolution_beside_a_half_one_stays_int8(kept: str, tmp_path: Path) -> None:
    """Both read one pair: each gets a DequantizeLinear of its own type, for a cast in between is a float kernel."""
    model = quantised_convs(2)
    first, second = (node for node in model.graph.node if node.op_type == "Conv")
    second.input[0] = first.input[0]
    model.graph.node.append(helper.make_node("Add", [first.output[0], second.output[0]], ["sum"], "/add"))
    model.graph.output[0].name = "sum"
    assert check(half_precision(model, keep={kept}), tmp_path, require_int8=CONVS[:2]).counts == {"INT8": 2}


@needs_compiler
def test_the_parser_rejects_what_jetson_would_reject(tmp_path: Path) -> None:
    model = quantised_convs(1, per_channel=False)
    for tensor in model.graph.initializer:
        if tensor.name == "zero":
            tensor.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), "zero"))
    report = check(model, tmp_path)
    assert report.status == "rejected"
    assert report.errors[0].node == "act0/Q"

    bias = [helper.make_node("DequantizeLinear", ["b32", "s"], ["b"], "bias/DQ"),
            helper.make_node("Add", ["x", "b"], ["y"], "/add")]
    model = graph_of(bias, inputs={"x": (1, 8)}, outputs={"y": (1, 8)},
                     constants={"b32": np.arange(8, dtype=np.int32), "s": np.array(0.5, np.float32)})
    report = check(model, tmp_path)
    assert (report.status, report.errors[0].node) == ("rejected", "bias/DQ")


@needs_compiler
def test_what_is_no_model_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"this is no protobuf")
    assert compile_check(path).status == "rejected"
    with pytest.raises(ModelFileError, match="no such model file"):
        compile_check(tmp_path / "other.onnx")


@needs_compiler
def test_dynamic_dimensions_get_a_profile(tmp_path: Path) -> None:
    model = quantised_convs(2)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    assert check(model, tmp_path).counts == {"INT8": 2}


@needs_compiler
def test_limits_reach_the_real_build(tmp_path: Path) -> None:
    assert check(quantised_convs(1), tmp_path, timeout_s=0.01).status == "timeout"
    assert check(quantised_convs(1), tmp_path, memory_mib=20).status == "out-of-memory"


@needs_compiler
@pytest.mark.parametrize("name", ["bev", "vit"])
def test_every_placed_layer_of_both_students_is_int8(name: str, tmp_path: Path) -> None:
    net, io = NETS[name]()
    samples = samples_of(io)
    made = ptq(net, io, samples)
    variants = write_variants(tmp_path, io, net, made.module, inputs=samples.inputs, opset=20, cpu="x86-64")
    placed = [row.module for row in made.placement.weights]
    found = verify_tensorrt(variants, placed)
    counts = found["files"]["int8"]["counts"]
    assert counts["INT8"] == len(found["required_int8"]) == len(placed)
    assert "FP32" not in counts
    assert set(found["files"]["fp16"]["counts"]) == {"FP16"}
    assert all(layer["outputs"] for layer in found["files"]["int8"]["layers"])
    with pytest.raises(GateError, match="no quantised weight"):
        verify_tensorrt(variants, [*placed, "head"])
    ours, cpu = (_weight_grids(Graph(onnx.load(str(variants.path(name))))) for name in ("int8", "int8-cpu"))
    assert len(ours) == len(placed)
    assert ours == cpu


def _weight_grids(graph: Graph) -> set[tuple[bytes, bytes]]:
    """Levels and scales of every quantised weight, sorted: one file may hold a weight transposed."""
    found = set()
    for node in graph.nodes(DQ):
        quantize = graph.maker.get(node.input[0])
        levels = graph.constants.get(node.input[0])
        if quantize is not None and quantize.input[0] in graph.constants:
            levels = quantised_weight(graph, quantize)
        if levels is not None and levels.ndim > 1:
            scale = graph.constants[node.input[1]].astype(np.float32)
            found.add((np.sort(levels.astype(np.int8), axis=None).tobytes(), np.sort(scale, axis=None).tobytes()))
    return found


@needs_compiler
def test_a_residual_stream_beyond_half_stays_fp32_and_still_compiles(tmp_path: Path) -> None:
    """Trained transformers have a few channels of 10^4 and more in their residual stream."""
    net, io = NETS["vit"]()
    with torch.no_grad():
        net.get_parameter("proj.bias")[3] = 7e4
    samples = samples_of(io)
    variants = write_variants(tmp_path, io, net, None, inputs=samples.inputs, opset=20, cpu="x86-64")
    kept = {row.op for row in variants.kept["fp16"]}
    assert kept >= {"Add", "LayerNormalization"}
    assert "MatMul" not in kept
    exact, typed = variants.predictor("fp32")(samples.inputs)["y0"], variants.predictor("fp16")(samples.inputs)["y0"]
    assert sqnr_db(exact, typed) > 45
    everything = half_precision(onnx.load(str(variants.path("fp32"))))
    feeds = {"x0": samples.inputs["x0"][:1]}
    overflown = run_model(rounding_made_explicit(everything).SerializeToString(), feeds, optimise=False)["y0"]
    assert not sqnr_db(exact[:1], overflown) > 20  # the control: without the probe
    counts = compile_check(variants.path("fp16")).counts
    assert counts["FP16"] >= 4


def test_the_check_is_on_where_the_compiler_is_and_missing_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULES, "tensorrt-rtx", "a_compiler_that_nobody_has")
    assert wanted_version(None) is None
    assert wanted_version(False) is None
    with pytest.raises(MissingDependencyError) as caught:
        wanted_version(True)
    assert caught.value.exit_code == 3


class _Flags10:
    EXPLICIT_BATCH, STRONGLY_TYPED = 0, 1


class _Flags11:
    pass


def test_strong_typing_is_asked_for_where_it_is_a_choice() -> None:
    said: list[str] = []
    assert network_flags(SimpleNamespace(NetworkDefinitionCreationFlag=_Flags10), said) == 0b11
    assert said == ["STRONGLY_TYPED", "EXPLICIT_BATCH"]
    assert network_flags(SimpleNamespace(NetworkDefinitionCreationFlag=_Flags11), []) == 0


def test_a_workspace_limit_that_was_not_taken_is_noticed() -> None:
    """TensorRT ignores values out of range without an exception, and takes the whole device."""
    deaf = SimpleNamespace(set_memory_pool_limit=lambda pool, size: None, get_memory_pool_limit=lambda pool: 2**40)
    trt = SimpleNamespace(MemoryPoolType=SimpleNamespace(WORKSPACE=0))
    with pytest.raises(ValueError, match="was not taken"):
        _limit_workspace(trt, deaf, Options(workspace_mib=64), Built("10.3"))

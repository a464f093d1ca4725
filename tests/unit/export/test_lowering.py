"""What lowering does to single constants, grids and nodes, on graphs written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fmdeploy.cli import main
from fmdeploy.errors import ArtifactError, ConfigError, DataError, ModelFileError
from fmdeploy.evaluate.sqnr import sqnr_db
from fmdeploy.export.export import export
from fmdeploy.export.foreign.grid import Grid
from fmdeploy.export.foreign.samples import read_samples
from fmdeploy.export.from_onnx import FILES, lower, lower_file
from fmdeploy.onnxfile.graph import DQ, Graph, Q, op_counts
from fmdeploy.onnxfile.session import run_model
from support.qdq import computed_scale, conv_file, file_of, one_node

NOISE = np.random.default_rng(1).uniform(-2, 2, (8, 3, 8, 8)).astype(np.float32)
X = (1, 3, 8, 8)


def written(model: ModelProto, folder: Path) -> Path:
    path = folder / "source.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def agreement_db(source: ModelProto, found: ModelProto) -> float:
    """Both as they are written, on one sample of noise inside the grid."""
    feeds = {source.graph.input[0].name: NOISE[:1]}
    one, other = (run_model(model.SerializeToString(), feeds, optimise=False) for model in (source, found))
    return min(sqnr_db(one[name], other[name]) for name in one)


def convolution(weight: np.ndarray[Any, Any], *weight_nodes: NodeProto, **constants: Any) -> ModelProto:
    """x -> Q -> DQ -> Conv with weights that `weight_nodes` turn from "w" into "wd"."""
    nodes = [helper.make_node(Q, ["x", "sx", "zx"], ["xq"], name="q"),
             helper.make_node(DQ, ["xq", "sx", "zx"], ["xd"], name="dq"), *weight_nodes,
             helper.make_node("Conv", ["xd", "wd"], ["y"], name="conv", pads=[1, 1, 1, 1])]
    stored = {"sx": np.float32(0.02), "zx": np.int8(0), "w": weight, **constants}
    return file_of(nodes, {k: np.asarray(v) for k, v in stored.items()}, {"x": X}, {"y": (1, 4, 8, 8)})


LEVELS = np.random.default_rng(2).integers(-127, 128, (4, 3, 3, 3))


@pytest.mark.parametrize("per_channel", [False, True])
def test_stored_int8_weights_keep_every_level(per_channel: bool) -> None:
    scale = np.array([0.01, 0.02, 0.003, 0.04], np.float32) if per_channel else np.float32(0.013)
    node = helper.make_node(DQ, ["w", "sw", "zw"], ["wd"], name="dqw", axis=0)
    source = convolution(LEVELS.astype(np.int8), node, sw=scale, zw=np.zeros(np.shape(scale), np.int8))
    lowered, _, log, _ = lower(source)
    assert log.changes == []
    assert agreement_db(source, lowered) == np.inf
    assert op_counts(lowered)[Q] == 2, "weights are float -> Q -> DQ, as every TensorRT reads them"


def test_uint8_weights_with_zero_point_128_are_int8() -> None:
    node = helper.make_node(DQ, ["w", "sw", "zw"], ["wd"], name="dqw")
    source = convolution((LEVELS + 128).astype(np.uint8), node, sw=np.float32(0.01), zw=np.uint8(128))
    lowered, _, log, _ = lower(source)
    assert log.changes == []
    assert agreement_db(source, lowered) == np.inf


def test_asymmetric_weights_get_a_scale_a_channel() -> None:
    node = helper.make_node(DQ, ["w", "sw", "zw"], ["wd"], name="dqw")
    source = convolution((LEVELS + 128).astype(np.uint8), node, sw=np.float32(0.01), zw=np.uint8(100))
    lowered, _, log, _ = lower(source)
    assert [change.tensor for change in log.changes] == ["w"]
    assert 0 < log.changes[0].cost_db < 7
    assert 30 < agreement_db(source, lowered) < 70
    graph = Graph(lowered)
    assert graph.constants[graph.maker[graph.nodes("Conv")[0].input[1]].input[1]].shape == (4,)


def test_weight_scales_along_the_inputs_are_turned() -> None:
    """ONNX allows them; TensorRT then runs in FP32 and ONNX Runtime fuses nothing."""
    scale = np.array([0.01, 0.02, 0.005], np.float32)
    node = helper.make_node(DQ, ["w", "sw", "zw"], ["wd"], name="dqw", axis=1)
    lowered, _, log, _ = lower(convolution(LEVELS.astype(np.int8), node, sw=scale, zw=np.zeros(3, np.int8)))
    assert len(log.changes) == 1
    quantize = next(n for n in lowered.graph.node if n.op_type == Q and n.input[0] != "x")
    assert helper.get_node_attr_value(quantize, "axis") == 0


def test_weights_behind_a_transpose_keep_their_channels() -> None:
    """A Linear on tokens: (out, in) weights, Q/DQ along 0, Transpose, MatMul."""
    weight = np.random.default_rng(3).normal(0, 0.1, (6, 8)).astype(np.float32)
    scale = (np.abs(weight).max(1) / 127).astype(np.float32)
    nodes = [helper.make_node(Q, ["x", "sx", "zx"], ["xq"], name="q"),
             helper.make_node(DQ, ["xq", "sx", "zx"], ["xd"], name="dq"),
             helper.make_node(Q, ["w", "sw", "zw"], ["wq"], name="qw", axis=0),
             helper.make_node(DQ, ["wq", "sw", "zw"], ["wd"], name="dqw", axis=0),
             helper.make_node("Transpose", ["wd"], ["wt"], name="t", perm=[1, 0]),
             helper.make_node("MatMul", ["xd", "wt"], ["y"], name="mm")]
    constants = {"sx": np.asarray(np.float32(0.02)), "zx": np.asarray(np.int8(0)), "w": weight, "sw": scale,
                 "zw": np.zeros(6, np.int8)}
    source = file_of(nodes, constants, {"x": X}, {"y": (1, 3, 8, 6)})
    lowered, _, log, _ = lower(source)
    assert log.changes == []
    assert agreement_db(source, lowered) == np.inf


def test_int32_bias_becomes_float() -> None:
    model = conv_file()
    stored = {"b": np.array([100, -5, 0, 7], np.int32), "sb": np.full(4, 4e-4, np.float32), "zb": np.zeros(4, np.int32)}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in stored.items())
    model.graph.node.insert(4, helper.make_node(DQ, ["b", "sb", "zb"], ["bf"], name="bias", axis=0))
    model.graph.node[5].input.append("bf")
    lowered, _, _, _ = lower(model)
    assert not any(t.data_type == TensorProto.INT32 for t in lowered.graph.initializer)
    assert agreement_db(model, lowered) > 120, "float32 rounding only"


def test_constants_identities_and_casts_of_other_exporters_go() -> None:
    between = (helper.make_node("Identity", ["xd"], ["xi"], name="nothing"),
               helper.make_node("Cast", ["xi"], ["xe"], name="empty", to=TensorProto.FLOAT))
    model = conv_file(between=between)
    moved = [tensor for tensor in model.graph.initializer if tensor.name in ("sx", "zx")]
    for tensor in moved:
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    lowered, _, _, _ = lower(model)
    assert set(op_counts(lowered)) == {Q, DQ, "Conv"}
    assert agreement_db(model, lowered) == np.inf


def test_pairs_of_different_readers_become_one_that_covers_both() -> None:
    model = conv_file(scale=0.02)
    model.graph.initializer.extend([numpy_helper.from_array(np.asarray(0.05, np.float32), "s2")])
    model.graph.node.insert(2, helper.make_node(Q, ["x", "s2", "zx"], ["x2q"], name="q2"))
    model.graph.node.insert(3, helper.make_node(DQ, ["x2q", "s2", "zx"], ["x2"], name="dq2"))
    model.graph.node.append(helper.make_node("Relu", ["x2"], ["z"], name="relu"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, X))
    lowered, _, log, _ = lower(model)
    graph = Graph(lowered)
    assert [float(graph.constants[n.input[1]]) for n in graph.nodes(Q) if n.input[0] == "x"] == [np.float32(0.05)]
    assert log.changes[0].cost_db == pytest.approx(20 * np.log10(2.5), abs=0.01)


def test_pair_on_an_output_keeps_its_name() -> None:
    nodes = [helper.make_node(Q, ["x", "s", "z"], ["q"], name="q"), helper.make_node(DQ, ["q", "s", "z"], ["y"], name="d1"),
             helper.make_node(DQ, ["q", "s", "z"], ["y2"], name="d2")]
    model = file_of(nodes, {"s": np.asarray(np.float32(0.1)), "z": np.asarray(np.int8(0))}, {"x": X}, {"y": X, "y2": X})
    lowered, _, _, _ = lower(model)
    assert [value.name for value in lowered.graph.output] == ["y", "y2"]
    assert agreement_db(model, lowered) == np.inf


def test_float16_files_are_lowered_through_float32(tmp_path: Path) -> None:
    nodes = [helper.make_node(Q, ["x", "s", "z"], ["q"], name="q"), helper.make_node(DQ, ["q", "s", "z"], ["y"], name="d")]
    model = file_of(nodes, {"s": np.asarray(np.float16(0.125)), "z": np.asarray(np.int8(0))}, {"x": X}, {"y": X}, opset=19,
                    kind=TensorProto.FLOAT16)
    np.savez(tmp_path / "c.npz", x=NOISE)
    lowered = lower_file(written(model, tmp_path), tmp_path / "out", calibration=tmp_path / "c.npz")
    assert any("float16" in note for note in lowered.notes)
    assert lowered.sqnr_db is not None
    assert min(lowered.sqnr_db[FILES[0]].values()) > 60


def test_covering_grids_clip_nothing() -> None:
    unsigned = Grid(np.asarray(np.float32(0.1)), np.asarray(0), 0, 255)
    assert float(unsigned.covering_scale()) * 127 == pytest.approx(25.5)
    shifted = Grid(np.asarray(np.float32(0.1)), np.asarray(-100), -128, 127)
    assert float(shifted.covering_scale()) * 127 == pytest.approx(22.7)
    moved = Grid(np.asarray(np.float32(0.1)), np.asarray(128), 0, 255)
    assert moved.is_symmetric
    assert float(moved.covering_scale()) == np.float32(0.1), "the same numbers in another spelling"


def _levels_read_elsewhere() -> ModelProto:
    model = conv_file()
    model.graph.node.insert(1, helper.make_node("MaxPool", ["xq"], ["xp"], name="pool", kernel_shape=[1, 1]))
    model.graph.node[2].input[0] = "xp"
    return model


def _other_scale() -> ModelProto:
    model = conv_file()
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(np.float32(1)), "s1"))
    model.graph.node[1].input[1] = "s1"
    return model


def _int8_input() -> ModelProto:
    return one_node(DQ, "x", "s", constants={"s": np.asarray(np.float32(1))}, kind=TensorProto.INT8,
                    result=TensorProto.FLOAT)


def _int8_output() -> ModelProto:
    return one_node(Q, "x", "s", "z", constants={"s": np.asarray(np.float32(1)), "z": np.asarray(np.int8(0))},
                    result=TensorProto.INT8)


def _unknown_to_tensorrt() -> ModelProto:
    model = conv_file(between=(helper.make_node("BitwiseNot", ["i"], ["j"], name="odd"),
                               helper.make_node("Identity", ["xd"], ["xe"], name="nothing")))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int32), "i"))
    model.graph.output.append(helper.make_tensor_value_info("j", TensorProto.INT32, (1,)))
    return model


def _said_16_bits() -> ModelProto:
    model = conv_file(opset=21, ir=10)
    for node in model.graph.node[:2]:
        del node.input[2:]
    model.graph.node[0].attribute.append(helper.make_attribute("output_dtype", TensorProto.INT16))
    return model


REFUSED = {
    "levels": (_levels_read_elsewhere, "node 'q' (QuantizeLinear): has its 8-bit levels read by MaxPool"),
    "other scale": (_other_scale, "node 'dq' (DequantizeLinear): reads levels with another scale"),
    "computed": (computed_scale, "computes its scale or zero point at run time"),
    "16 bits": (lambda: conv_file(zero=np.int16(0), opset=21, ir=10), "expected int8 or uint8, found int16"),
    "16 bits by attribute": (_said_16_bits, "expected int8 or uint8, found int16"),
    "int8 input": (_int8_input, "node 'n' (DequantizeLinear): reads 8-bit values that no QuantizeLinear made"),
    "int8 output": (_int8_output, "node 'n' (QuantizeLinear): hands 8-bit levels out"),
    "nothing": (lambda: one_node("Relu"), "holds no QuantizeLinear"),
    "operators": (lambda: one_node("ConvInteger", "x", "w", kind=TensorProto.UINT8, result=TensorProto.INT32,
                                   constants={"w": np.ones((4, 4, 1, 1), np.uint8)}),
                  "node 'n' (ConvInteger): is in the operator form"),
    "old": (lambda: one_node(Q, "x", "s", "z", opset=11, result=TensorProto.INT8, constants={
        "s": np.asarray(np.float32(1)), "z": np.asarray(np.int8(0))}), "expected >= 13, found 11"),
    "unbuildable": (_unknown_to_tensorrt, "odd: cannot become a TensorRT file, FMD201"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_lowered_is_named_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    make, said = REFUSED[name]
    with pytest.raises(ModelFileError) as caught:
        lower_file(written(make(), tmp_path), tmp_path / "out")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source.onnx"]


def test_output_folder_is_never_an_artifact_and_files_are_replaced_together(tmp_path: Path) -> None:
    source = written(conv_file(), tmp_path)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is no plain folder"):
        lower_file(source, bundle)
    with pytest.raises(ArtifactError, match="is no plain folder"):
        lower_file(source, source)
    out = tmp_path / "out"
    first = lower_file(source, out)
    content = [(out / name).read_bytes() for name in FILES]
    (out / "mine.txt").write_text("kept")
    assert lower_file(source, out) == first
    assert [(out / name).read_bytes() for name in FILES] == content, "equal sources give equal bytes"
    assert (out / "mine.txt").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"source.onnx", "bundle", "out"}, "no scratch folder is left"


@pytest.mark.parametrize(("arrays", "said"), [
    ({"y": NOISE}, "holds nothing for the input 'x'"), ({"x": NOISE[0]}, "does not fit the model"),
    ({"x": NOISE[:0]}, "holds no sample"), ({"x": np.full((2, 3, 8, 8), np.nan, np.float32)}, "NaN"),
    ({"x": np.zeros((2, 3, 8, 8), np.float32)}, "every value is the same"), ({"x": NOISE[:, :2]}, "expected ['N', 3, 8, 8]"),
    ({"x": np.array(["a"])}, "does not fit"), ({"x": np.float64(NOISE) * 1e300}, "the type of the input does not"),
])
def test_calibration_data_is_checked(arrays: dict[str, Any], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", **arrays)
    with pytest.raises(DataError) as caught:
        read_samples(tmp_path / "c.npz", conv_file())
    assert said in str(caught.value)


def test_calibration_files_of_other_kinds(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": NOISE}, tmp_path / "c.safetensors")
    assert read_samples(tmp_path / "c.safetensors", conv_file())["x"].shape == (8, 3, 8, 8)
    for name, content in (("a.npz", b"no zip"), ("b.safetensors", b"\xff" * 20)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"is not a readable \.npz or \.safetensors file"):
            read_samples(tmp_path / name, conv_file())
    np.savez(tmp_path / "pickle.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="not a readable"):
        read_samples(tmp_path / "pickle.npz", conv_file())
    with pytest.raises(DataError, match="no such calibration file"):
        read_samples(tmp_path / "none.npz", conv_file())


def test_command_writes_both_files_and_says_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(conv_file(zero=np.uint8(0), scale=0.01), tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--from-onnx", str(source), "--out", str(tmp_path / "out"), "--json"])
    assert stopped.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert [Path(name).name for name in found["files"]] == list(FILES)
    assert all(Path(name).is_file() for name in found["files"])
    assert [(row["tensor"], round(row["cost_db"], 2)) for row in found["changes"]] == [("x", 6.05)]
    assert found["sqnr_db"] is None
    outcome = export(from_onnx=source, out=tmp_path / "out")
    assert any("6.1 dB coarser" in line for line in outcome.lines)
    assert "not measured against the source: give --calibration FILE.npz" in outcome.lines


def test_modes_do_not_mix(tmp_path: Path) -> None:
    source = written(conv_file(), tmp_path)
    with pytest.raises(ConfigError, match="one thing at a time"):
        export(from_onnx=source, lint=source)
    with pytest.raises(ConfigError, match="two files need a place"):
        export(from_onnx=source)

"""Hostile and broken ONNX files are refused in one line that names the place, before any runtime sees them."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fmdeploy.errors import ModelFileError
from fmdeploy.onnxfile.graph import DQ, Q
from fmdeploy.onnxfile.header import NEWEST_IR, NEWEST_OPSET
from fmdeploy.onnxfile.reading import read_bytes, read_model
from fmdeploy.onnxfile.structure import MAX_ELEMENTS
from support.qdq import conv_file, file_of, one_node

Change = Callable[[ModelProto], object]


def written(model: ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        read_model(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    assert caught.value.fix or caught.value.expected or "not valid ONNX" in text
    return text


def constant(model: ModelProto, name: str, value: object) -> None:
    """Replace an initialiser."""
    index = next(k for k, tensor in enumerate(model.graph.initializer) if tensor.name == name)
    model.graph.initializer[index].CopyFrom(numpy_helper.from_array(np.asarray(value), name))


def test_a_good_file_comes_back_as_it_was(tmp_path: Path) -> None:
    model = conv_file()
    assert read_model(written(model, tmp_path)) == model


@pytest.mark.parametrize(("content", "said"), [
    (b"", "is empty"), (b"not a model", "is not an ONNX model"), (b"\x08\x08garbage\xff\xff", "is not an ONNX model"),
    (b"\x1f\x8b\x08\x00" + b"\0" * 50, "is not an ONNX model"), (b"\x08\x09", "holds no graph"),
])
def test_files_that_hold_no_model(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    assert said in refusal(tmp_path / "m.onnx")


def test_truncated_at_any_length(tmp_path: Path) -> None:
    content, path = conv_file().SerializeToString(), tmp_path / "m.onnx"
    for length in range(1, len(content), 7):
        path.write_bytes(content[:length])
        refusal(path)


def test_things_that_are_no_files_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert "a FIFO" in refusal(tmp_path / "fifo")
        assert "a directory" in refusal(tmp_path / "folder")
        assert "cannot be opened" in refusal(tmp_path / "socket")
    assert "a device" in refusal(Path("/dev/zero"))
    assert "no such model file" in refusal(tmp_path / "none")
    with pytest.raises(ModelFileError, match="null byte"):
        read_model(Path("a\0b"))


def test_size_is_bounded_before_reading(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * 100)
    with pytest.raises(ModelFileError, match="too big"):
        read_bytes(tmp_path / "big", limit=99)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**31)  # takes no disk
    assert "too big" in refusal(tmp_path / "sparse")


def _cycle(model: ModelProto) -> None:
    model.graph.node[1].input[0] = "loop"
    model.graph.node.append(helper.make_node("Relu", ["xd"], ["loop"], name="back"))


def _unsorted(model: ModelProto) -> None:
    first = model.graph.node[0]
    copied = onnx.NodeProto()
    copied.CopyFrom(first)
    model.graph.node.remove(first)
    model.graph.node.append(copied)


def _branch(model: ModelProto) -> None:
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["b"])], "b", [],
                             [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], name="branch", then_branch=body, else_branch=body))


def _loop_hidden_in_an_attribute(model: ModelProto) -> None:
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["b"])], "b", [],
                             [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)])
    model.graph.node[0].attribute.append(helper.make_attribute("body", body))


def _sparse(model: ModelProto) -> None:
    values = helper.make_tensor("w2", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def _function(model: ModelProto) -> None:
    model.functions.append(helper.make_function("local", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])],
                                                [helper.make_opsetid("", 18)]))


def _huge(model: ModelProto) -> None:
    model.graph.initializer.append(TensorProto(name="h", data_type=1, dims=[2**20, 2**20]))


def _huge_inferred(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**40, 2**4], np.int64), "shape"))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["shape"], ["h"], name="bomb"))


def _three_scales(model: ModelProto) -> None:
    constant(model, "sw", np.ones(3, np.float32))
    constant(model, "zw", np.zeros(3, np.int8))


def _no_such_axis(model: ModelProto) -> None:
    for node in model.graph.node[2:4]:
        node.attribute[0].i = 7


STRUCTURE: dict[str, tuple[Change, str]] = {
    "cycle": (_cycle, "has a cycle"),
    "unsorted": (_unsorted, "reads a tensor before it is made"),
    "undefined": (lambda m: m.graph.node[0].input.__setitem__(0, "ghost"), "reads the tensor 'ghost', which nothing defines"),
    "lost output": (lambda m: setattr(m.graph.output[0], "name", "ghost"), "'ghost': has an output that no node makes"),
    "tensor twice": (lambda m: m.graph.node[1].output.__setitem__(0, "xq"), "'xq': defines a tensor twice"),
    "initialiser twice": (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "'sx': defines a tensor twice"),
    "node twice": (lambda m: setattr(m.graph.node[1], "name", "q"), "node 'q': has two nodes of one name"),
    "IR of the future": (lambda m: setattr(m, "ir_version", NEWEST_IR + 1), f"expected 3 to {NEWEST_IR}"),
    "opset of the future": (lambda m: setattr(m.opset_import[0], "version", NEWEST_OPSET + 1), f"to {NEWEST_OPSET}"),
    "no opset": (lambda m: m.ClearField("opset_import"), "does not name one ONNX opset"),
    "foreign domain": (lambda m: setattr(m.graph.node[0], "domain", "com.evil"), "'com.evil.QuantizeLinear'"),
    "ORT's domain": (lambda m: setattr(m.graph.node[0], "domain", "com.microsoft"), "QuantFormat.QDQ"),
    "unknown operator": (lambda m: setattr(m.graph.node[-1], "op_type", "Magic"), "is not valid ONNX"),
    "control flow": (_branch, "node 'branch' (If): holds control flow"),
    "hidden graph": (_loop_hidden_in_an_attribute, "node 'q' (QuantizeLinear): holds control flow"),
    "sparse weights": (_sparse, "'w2': holds sparse weights"),
    "function": (_function, "function 'F': defines functions of its own"),
    "training": (lambda m: m.training_info.add(), "holds training information"),
    "huge": (_huge, f"at most {MAX_ELEMENTS} elements"),
    "huge, inferred": (_huge_inferred, f"at most {MAX_ELEMENTS} elements"),
    "negative size": (lambda m: m.graph.initializer[4].dims.__setitem__(0, -4), "declares a size that cannot be"),
    "short data": (lambda m: setattr(m.graph.initializer[4], "raw_data", b"\0" * 8), "'w': does not hold the values"),
    "unknown type": (lambda m: setattr(m.graph.initializer[4], "data_type", 99), "'w': does not hold the values"),
    "no outputs": (lambda m: m.graph.ClearField("output"), "has no outputs"),
    "no nodes": (lambda m: m.graph.ClearField("node"), "holds no graph"),
    "sequence input": (lambda m: m.graph.input[0].type.CopyFrom(helper.make_sequence_type_proto(
        helper.make_tensor_type_proto(1, None))), "'x': has an input or output that is no tensor"),
}
NUMBERS: dict[str, tuple[Change, str]] = {
    **{f"scale {value}": (partial(constant, name="sx", value=np.array(value, np.float32)),
                          "node 'q' (QuantizeLinear): has a scale") for value in (0.0, -0.1, np.nan, np.inf, 1e-40)},
    "one bad of many": (lambda m: constant(m, "sw", np.array([1, 1, 0, 1], np.float32)), "node 'qw' (QuantizeLinear)"),
    "no scale": (lambda m: constant(m, "sw", np.zeros(0, np.float32)), "node 'qw' (QuantizeLinear): has no scale"),
    "too few scales": (_three_scales, "another number of scales than channels (expected 4, found 3)"),
    "axis": (_no_such_axis, "axis"),
    "zero points": (lambda m: constant(m, "zw", np.zeros(3, np.int8)), "another number of zero points than scales"),
    "zero point of a type": (lambda m: m.graph.node[1].input.__setitem__(2, "zu"), "zero_point has inconsistent type"),
}


@pytest.mark.parametrize("name", [*STRUCTURE, *NUMBERS])
def test_refusal_names_the_place(name: str, tmp_path: Path) -> None:
    model = conv_file()
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.uint8), "zu"))
    change, said = {**STRUCTURE, **NUMBERS}[name]
    change(model)
    assert said in refusal(written(model, tmp_path))


def test_scales_of_half_precision_may_be_subnormal(tmp_path: Path) -> None:
    """That is how a float16 says 1e-6; in float32 1e-40 means that nothing was calibrated."""
    scale = np.float16(1e-6)
    nodes = [helper.make_node(Q, ["x", "s", "z"], ["q"]), helper.make_node(DQ, ["q", "s", "z"], ["y"])]
    model = file_of(nodes, {"s": np.asarray(scale), "z": np.array(0, np.int8)}, {"x": (1, 2)}, {"y": (1, 2)}, opset=19,
                    kind=TensorProto.FLOAT16)
    read_model(written(model, tmp_path))


def test_int32_bias_has_no_zero_point(tmp_path: Path) -> None:
    node = helper.make_node(DQ, ["b", "s", "z"], ["y"], name="bias")
    constants = {"b": np.array([1, 2], np.int32), "s": np.array(0.1, np.float32), "z": np.array(3, np.int32)}
    model = file_of([node, helper.make_node("Identity", ["x"], ["unused"])], constants, {"x": (1,)}, {"y": (2,)})
    assert "node 'bias' (DequantizeLinear)" in refusal(written(model, tmp_path))


def test_output_without_a_shape_gets_the_inferred_one(tmp_path: Path) -> None:
    model = conv_file()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    read = read_model(written(model, tmp_path))
    assert [axis.dim_value for axis in read.graph.output[0].type.tensor_type.shape.dim] == [1, 4, 8, 8]


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    model = conv_file()
    model.graph.node[0].input[0] = "\x1b[31m" + "evil\n" * 100
    text = refusal(written(model, tmp_path))
    assert "\x1b" not in text
    assert len(text) < 400


def external(folder: Path, location: str | None = None, **entries: str) -> Path:
    """A model whose weights `w` are in weights.bin, or where `location` says."""
    model = conv_file()
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    (folder / "weights.bin").write_bytes(weights.raw_data)
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location or "weights.bin", **entries}.items():
        weights.external_data.add(key=key, value=value)
    return written(model, folder)


def test_external_weights_of_the_own_folder_are_embedded(tmp_path: Path) -> None:
    assert read_model(external(tmp_path)) == conv_file()
    content = (tmp_path / "weights.bin").read_bytes()
    path = external(tmp_path, "sub/part.bin", offset="16", length=str(len(content)))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "part.bin").write_bytes(b"\0" * 16 + content + b"\0" * 5)
    assert read_model(path) == conv_file()


@pytest.mark.parametrize("location", [
    "../weights.bin", "/etc/passwd", "a/../../weights.bin", "*/_ORT_MEM_ADDR_/*", "..", "", "C:\\weights.bin", "a\0b",
])
def test_weights_outside_the_folder_are_refused(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(b"\0" * 10_000)
    path = external(folder)
    model = onnx.load(str(path), load_external_data=False)
    entry = next(tensor for tensor in model.graph.initializer if tensor.name == "w").external_data[0]
    entry.value = location
    text = refusal(written(model, folder))
    assert "'w'" in text
    assert "outside its folder" in text


def test_links_and_short_files_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside.bin"
    outside.write_bytes(b"\0" * 10_000)
    folder = tmp_path / "model"
    folder.mkdir()
    path = external(folder, "link.bin")
    (folder / "link.bin").symlink_to(outside)
    assert "symbolic link" in refusal(path)
    path = external(folder, "way/outside.bin")
    (folder / "way").symlink_to(tmp_path)
    assert "symbolic link" in refusal(path)
    path = external(folder, "hard.bin")
    os.link(outside, folder / "hard.bin")
    assert "hard link" in refusal(path)
    path = external(folder, "fifo.bin")
    os.mkfifo(folder / "fifo.bin")
    assert "no plain file" in refusal(path)
    assert "which cannot be opened" in refusal(external(folder, "none.bin"))
    assert "too short" in refusal(external(folder, offset="4", length="432"))
    assert "no number" in refusal(external(folder, offset="-1"))
    assert "no number" in refusal(external(folder, length="1e9"))


def test_external_data_in_an_attribute_is_seen_too(tmp_path: Path) -> None:
    model = one_node("Relu")
    tensor = TensorProto(name="t", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../x")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], name="k", value=tensor))
    assert "outside its folder" in refusal(written(model, tmp_path))


SOURCES = [conv_file().SerializeToString(), conv_file(zero=np.uint8(128), opset=13, ir=7).SerializeToString(),
           one_node("Relu").SerializeToString()]


@given(which=st.integers(0, len(SOURCES) - 1), seed=st.integers(0, 2**32), flips=st.integers(1, 6), cut=st.floats(0.5, 1.2))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@example(which=0, seed=0, flips=1, cut=1.2)
def test_any_corruption_loads_to_a_valid_model_or_is_refused(
    which: int, seed: int, flips: int, cut: float, tmp_path: Path
) -> None:
    content, chance = bytearray(SOURCES[which]), random.Random(seed)
    for _ in range(flips):
        place = chance.randrange(len(content))
        content[place] = chance.choice((content[place] ^ (1 << chance.randrange(8)), chance.randrange(256)))
    path = tmp_path / "m.onnx"
    path.write_bytes(content[: int(cut * len(content))])
    try:
        model = read_model(path)
    except ModelFileError:
        refusal(path)
    else:
        onnx.checker.check_model(model, full_check=True)

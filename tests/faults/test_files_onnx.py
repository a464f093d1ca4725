"""Bad ONNX files (faults.md 5.2, 5.3, F28, F29): refused before ONNX Runtime sees a byte of them.

The bundle around each file is sealed as if nothing were wrong with it: hashes cannot help here, only the checks.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper

from fmdeploy.errors import ArtifactError, ModelFileError
from fmdeploy.runtime.bundle import open_bundle
from fmdeploy.runtime.onnxcheck.checks import check_model, remarks
from fmdeploy.runtime.onnxcheck.interface import Declared
from fmdeploy.runtime.tiers import admit_tier
from support.badfiles import Change, check, edited, initializer, refused_by_runtime, replace
from support.bundles import fp32_model, inputs, int8_model, io_spec, make_bundle
from support.fdti import Fdti


def accepted_by_onnxruntime(raw: bytes) -> bool:
    """Whether plain ONNX Runtime makes a session of it: what the checks here must add."""
    try:
        onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True


def refuse(raw: bytes, message: str, fdti: Fdti, *, variant: str = "fp32", declared: Declared | None = None) -> None:
    with fdti.detecting(), pytest.raises(ModelFileError, match=message) as caught:
        check(raw, variant=variant, declared=declared)
    assert "\n" not in str(caught.value)
    assert f"model.{variant}.onnx" in str(caught.value)
    assert caught.value.exit_code == 2


# M7 to M11: data outside the file.


def outside(location: str, *, where: str = "initializer", length: int | None = None) -> bytes:
    def change(model: ModelProto) -> None:
        tensor = initializer(model, "w1")
        if where == "attribute":
            node = model.graph.node.add(op_type="Constant", name="const", output=["unused"])
            node.attribute.add(name="value", type=AttributeProto.TENSOR).t.CopyFrom(tensor)
            tensor = node.attribute[0].t
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        if length is not None:
            tensor.external_data.add(key="length", value=str(length))

    return edited(change)


OUTSIDE = "tensor 'w1': refers to data outside the file"


def test_M7_external_data_above_the_folder(tmp_path: Path, fdti: Fdti) -> None:
    refuse(outside("../x"), OUTSIDE, fdti)
    refuse(outside("../x", where="attribute"), OUTSIDE, fdti)
    assert re.search(OUTSIDE, refused_by_runtime(tmp_path, outside("../x")))


def test_M8_external_data_at_an_absolute_path(fdti: Fdti) -> None:
    refuse(outside("/etc/passwd"), OUTSIDE, fdti)


def test_M9_external_data_behind_a_link(tmp_path: Path, fdti: Fdti) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(4 * 8 * 20 * 9))
    root = make_bundle(tmp_path / "b", change=lambda draft: draft.path("model.fp32.onnx").write_bytes(outside("w.bin"))).root
    (root / "w.bin").symlink_to(secret)
    with fdti.detecting("a link beside the model"), pytest.raises(ArtifactError, match=r"does not list: w\.bin"):
        open_bundle(root)
    (root / "w.bin").unlink()
    (root / "sub").symlink_to(tmp_path)
    with fdti.detecting("a link to a folder"), pytest.raises(ArtifactError, match="does not list: sub"):
        open_bundle(root)
    refuse(outside("sub/secret.bin"), OUTSIDE, fdti)


def test_M10_external_data_that_is_missing_or_short(fdti: Fdti) -> None:
    refuse(outside("missing.bin"), OUTSIDE, fdti)
    refuse(outside("w.bin", length=1), OUTSIDE, fdti)


@pytest.mark.parametrize("marker", ["*/_ORT_MEM_ADDR_/*", "", "w.bin"])
def test_M11_marker_that_crashes_older_runtimes(marker: str, fdti: Fdti) -> None:
    refuse(outside(marker), OUTSIDE, fdti)


def test_M11_external_data_without_the_flag_that_says_so(fdti: Fdti) -> None:
    def change(model: ModelProto) -> None:
        initializer(model, "w1").external_data.add(key="location", value="../x")

    refuse(edited(change), OUTSIDE, fdti)


# M12, M13: sizes.


@pytest.mark.parametrize("change", [
    lambda t: setattr(t, "raw_data", t.raw_data[:-1]), lambda t: setattr(t, "raw_data", t.raw_data + b"\0\0\0\0"),
    lambda t: t.ClearField("raw_data"), lambda t: t.float_data.append(1.0),
    lambda t: setattr(t, "data_type", TensorProto.DOUBLE), lambda t: setattr(t, "data_type", TensorProto.STRING),
    lambda t: setattr(t, "data_type", 999)],
    ids=["shorter", "longer", "none", "twice", "other type", "text", "unknown type"])
def test_M12_bytes_that_do_not_fill_the_shape(change: Any, fdti: Fdti) -> None:
    refuse(edited(lambda model: change(initializer(model, "w1"))), "tensor 'w1': (does not hold|stores its values twice|holds text|has a type)", fdti)


@pytest.mark.parametrize("dims", [[-1, 20, 3, 3], [2**40, 20, 3, 3], [2**33, 2**33, 1, 1], [2**62, 4], [1] * 40,
                                  [-(2**63), 2]])
def test_M13_sizes_that_cannot_be(dims: list[int], fdti: Fdti) -> None:
    def change(model: ModelProto) -> None:
        tensor = initializer(model, "w1")
        del tensor.dims[:]
        tensor.dims.extend(dims)

    refuse(edited(change), "'w1': declares a size that cannot be", fdti)


def test_M13_declared_shapes_and_memory_that_a_node_asks_for(fdti: Fdti) -> None:
    def declare(model: ModelProto) -> None:
        model.graph.value_info.append(helper.make_tensor_value_info("a1", TensorProto.FLOAT, [1, 2**40]))

    refuse(edited(declare), "'a1': declares a size that cannot be", fdti)
    for op_type, extra in (("ConstantOfShape", []), ("Expand", ["w4"]), ("Tile", ["w4"])):
        def ask(model: ModelProto, op_type: str = op_type, extra: list[str] = extra) -> None:
            model.graph.initializer.append(numpy_helper.from_array(np.array([2**22, 2**22], np.int64), "huge"))
            model.graph.node.append(helper.make_node(op_type, [*extra, "huge"], ["big"], "big"))

        refuse(edited(ask), "node 'big' .*asks for more than memory holds", fdti)

    def computed(model: ModelProto) -> None:
        model.graph.node.append(helper.make_node("Shape", ["flat"], ["shape"], "shape"))
        model.graph.node.append(helper.make_node("ConstantOfShape", ["shape"], ["big"], "big"))

    refuse(edited(computed), "size only the input decides", fdti)


# M14, M15: operators and versions.


@pytest.mark.parametrize(("op_type", "domain"), [("Frobnicate", ""), ("FusedConv", "com.microsoft"),
                                                 ("Relu", "evil.example"), ("NonZero", ""), ("RandomNormal", "")])
def test_M14_unknown_operators_and_domains(op_type: str, domain: str, fdti: Fdti) -> None:
    def change(model: ModelProto) -> None:
        model.graph.node[2].op_type, model.graph.node[2].domain = op_type, domain
        model.graph.node[2].name = "odd"

    refuse(edited(change), "node 'odd' .*(is not an operator that may run|foreign domain)", fdti)


def test_M14_functions_training_and_sparse_weights(fdti: Fdti) -> None:
    relu = helper.make_node("Relu", ["x"], ["y"])
    function = helper.make_function("local", "F", ["x"], ["y"], [relu], [helper.make_opsetid("", 17)])
    refuse(edited(lambda model: model.functions.append(function)), "functions of its own", fdti)
    refuse(edited(lambda model: model.training_info.add()), "training information", fdti)
    refuse(edited(lambda model: model.graph.sparse_initializer.add()), "sparse weights", fdti)


@pytest.mark.parametrize("change", [
    lambda m: setattr(m.opset_import[0], "version", 99), lambda m: setattr(m.opset_import[0], "version", 1),
    lambda m: setattr(m, "ir_version", 99), lambda m: setattr(m, "ir_version", 0),
    lambda m: setattr(m.opset_import[0], "version", -5), lambda m: m.ClearField("opset_import"),
    lambda m: m.opset_import.add(domain="ai.onnx", version=20)],
    ids=["opset 99", "opset 1", "IR 99", "IR 0", "opset -5", "no opset", "two opsets"])
def test_M15_versions_from_the_future_and_the_past(change: Change, fdti: Fdti) -> None:
    refuse(edited(change), r"(expected \d+ to \d+|does not name one ONNX opset)", fdti)


# M16, M17: structure.


def _cycle(model: ModelProto) -> None:
    model.graph.node[1].input[0] = "r2"


def _swap(model: ModelProto) -> None:
    first, second = (type(n).FromString(n.SerializeToString()) for n in model.graph.node[1:3])
    model.graph.node[1].CopyFrom(second)
    model.graph.node[2].CopyFrom(first)


def _same_name(model: ModelProto) -> None:
    model.graph.node[1].name = model.graph.node[3].name = "same"


STRUCTURE: dict[str, tuple[Any, str]] = {
    "cycle": (_cycle, "has a cycle"),
    "its own input": (lambda m: m.graph.node[2].input.__setitem__(0, "r1"), "has a cycle"),
    "unsorted": (_swap, "before it is made"),
    "dangling input": (lambda m: m.graph.node[1].input.__setitem__(0, "nothing"), "which nothing defines"),
    "duplicate output": (lambda m: m.graph.node[3].output.__setitem__(0, "a1"), "defines a tensor twice"),
    "output over a weight": (lambda m: m.graph.node[3].output.__setitem__(0, "w1"), "defines a tensor twice"),
    "output over an input": (lambda m: m.graph.node[3].output.__setitem__(0, "lidar"), "defines a tensor twice"),
    "weight over an input": (lambda m: setattr(m.graph.initializer[0], "name", "lidar"), "defines a tensor twice"),
    "dangling output": (lambda m: m.graph.node[5].output.__setitem__(0, "elsewhere"), "no node makes"),
    "no nodes": (lambda m: m.graph.ClearField("node"), "holds no network"),
    "no graph": (lambda m: m.ClearField("graph"), "it holds no graph"),
    "two nodes of one name": (_same_name, "two nodes of one name"),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_M16_graphs_that_are_no_graphs(case: str, fdti: Fdti) -> None:
    change, message = STRUCTURE[case]
    refuse(edited(change), message, fdti)


def _loop(model: ModelProto) -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Identity", ["v"], ["v2"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("c", TensorProto.BOOL, []),
         helper.make_tensor_value_info("v", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("c2", TensorProto.BOOL, []), helper.make_tensor_value_info("v2", TensorProto.FLOAT, None)])
    model.graph.initializer.extend([numpy_helper.from_array(np.array(2**62), "trips"),
                                    numpy_helper.from_array(np.array(True), "go")])
    model.graph.node[4].CopyFrom(helper.make_node("Loop", ["trips", "go", "a2"], ["r2"], "forever", body=body))


def test_M17_loop_that_never_ends(tmp_path: Path, fdti: Fdti) -> None:
    raw = edited(_loop)
    assert accepted_by_onnxruntime(raw), "the file must be one that a runtime would run for ever"
    refuse(raw, "node 'forever' .*control flow", fdti)
    assert "control flow" in refused_by_runtime(tmp_path, raw)


def test_M17_graph_in_an_attribute_of_a_plain_operator(fdti: Fdti) -> None:
    def change(model: ModelProto) -> None:
        model.graph.node[2].attribute.add(name="body", type=AttributeProto.GRAPH).g.name = "hidden"

    refuse(edited(change), "control flow", fdti)


# M18: weights.


def _weight(value: float, count: int = 1) -> Change:
    def change(model: ModelProto) -> None:
        def put(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            array.reshape(-1)[:count] = value
            return array

        replace(model, "w2", put)

    return change


@pytest.mark.parametrize(("value", "count", "message"), [
    (np.nan, 1, "'w2': holds weights that are no numbers .*found 1 of"),
    (np.inf, 1, "no numbers .*inf"), (-np.inf, 3, "no numbers .*found 3 of"),
    (1e-41, 60, "'w2': holds weights too small for float32")])
def test_M18_weights_that_are_no_weights(value: float, count: int, message: str, fdti: Fdti) -> None:
    raw = edited(_weight(value, count))
    assert accepted_by_onnxruntime(raw)
    refuse(raw, message, fdti)


def _all_zero(*names: str) -> Change:
    def change(model: ModelProto) -> None:
        for name in names:
            replace(model, name, np.zeros_like)

    return change


@pytest.mark.parametrize(("variant", "suffix"), [("fp32", ""), ("int8-cpu", "_quantized")])
def test_M18_network_of_nothing_but_zeros(variant: str, suffix: str, fdti: Fdti) -> None:
    raw = edited(_all_zero(*(f"w{k}{suffix}" for k in (1, 2, 3, 4))), variant=variant)
    assert accepted_by_onnxruntime(raw)
    refuse(raw, "is a network of nothing but zeros", fdti, variant=variant)


@pytest.mark.parametrize(("variant", "suffix"), [("fp32", ""), ("int8-cpu", "_quantized")])
def test_M18_one_layer_of_zeros_passes_with_a_remark(variant: str, suffix: str) -> None:
    raw = edited(_all_zero(f"w2{suffix}"), variant=variant)
    model = check_model(raw, io_spec(), where="model.onnx", declared=Declared(variant.startswith("int8")))
    assert [f"'w2{suffix}' is a weight of nothing but zeros (1 of 4)" in one for one in remarks(model)] == [True]
    whole = check_model(edited(lambda model: None, variant=variant), io_spec(), where="model.onnx")
    assert remarks(whole) == ()


def test_M18_NaN_in_a_constant_of_a_node(fdti: Fdti) -> None:
    def change(model: ModelProto) -> None:
        value = numpy_helper.from_array(np.array([np.nan], np.float32), "c")
        model.graph.node.append(helper.make_node("Constant", [], ["c"], "c", value=value))

    refuse(edited(change), "no numbers", fdti)


@pytest.mark.parametrize("attribute", [{"value_float": float("nan")}, {"value_floats": [1.0] * 15 + [float("inf")]}, {"value_float": float("inf")}])
def test_M18_no_number_in_a_plain_constant(attribute: dict[str, Any], fdti: Fdti) -> None:
    def change(model: ModelProto) -> None:
        model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], "c", **attribute))
        model.graph.node.insert(1, helper.make_node("Add", ["lidar", "c"], ["unused"], "sum"))

    raw = edited(change)
    assert accepted_by_onnxruntime(raw)
    refuse(raw, "no number", fdti)


def test_M18_control_infinite_mask_and_open_bound_pass() -> None:
    def change(model: ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(-np.inf, np.float32), "masked"))
        model.graph.initializer.append(numpy_helper.from_array(np.array(False), "nowhere"))
        model.graph.node.append(helper.make_node("Where", ["nowhere", "masked", "a1"], ["chosen"], "where"))
        model.graph.node.append(helper.make_node("Clip", ["chosen", "masked"], ["unused"], "clip"))

    check(edited(change))


def test_M18_control_large_and_few_tiny_weights_pass() -> None:
    check(edited(_weight(3e38, 64)))
    check(edited(_weight(1e-41, 2)))


# M19: declared INT8.


def test_M19_float_file_that_calls_itself_INT8(tmp_path: Path, fdti: Fdti) -> None:
    refuse(fp32_model(), r"is declared INT8, 0% quantised \(0 of 4 products\)", fdti, variant="int8-cpu")
    assert "declared INT8" in refused_by_runtime(tmp_path, fp32_model(), "int8-cpu")


def _float_island(model: ModelProto) -> None:
    """Give one convolution its float input again."""
    conv = next(node for node in model.graph.node if node.op_type == "Conv" and "w2" in node.input[1])
    makers = {name: node for node in model.graph.node for name in node.output}
    conv.input[0] = makers[makers[conv.input[0]].input[0]].input[0]
    conv.name = "island"


def test_M19_float_island_against_the_placement(fdti: Fdti) -> None:
    raw = edited(_float_island, variant="int8-cpu")
    assert accepted_by_onnxruntime(raw)
    refuse(raw, r"declared INT8, 75% quantised .*1 in float", fdti, variant="int8-cpu", declared=Declared(True, None, ("island",)))


def test_M19_another_number_of_pairs_than_the_metrics_say(tmp_path: Path, fdti: Fdti) -> None:
    def change(draft: Any) -> None:
        draft.write_json("metrics.json", {"variants": {"int8-cpu": {"quantize_pairs": 99}}})

    root = make_bundle(tmp_path / "b", change=change).root
    with fdti.detecting():
        report = admit_tier(open_bundle(root), "int8-cpu", 1)[1]
    assert "expected 99 Q/DQ pairs" in report.reason


# M20, M21: promises.


def _dim(model: ModelProto, **value: Any) -> None:
    dim = model.graph.input[0].type.tensor_type.shape.dim[0]
    for name, one in value.items():
        setattr(dim, name, one)


def _rename(model: ModelProto) -> None:
    model.graph.input[0].name = model.graph.node[0].input[0] = "radar"


PROMISES: dict[str, tuple[str, Any, str]] = {
    "input renamed": ("M20", lambda m: _rename(m), "has other inputs than io.json"),
    "inputs swapped": ("M20", lambda m: m.graph.input.sort(key=lambda v: v.name), "has other inputs"),
    "outputs swapped": ("M20", lambda m: m.graph.output.reverse(), "has other outputs"),
    "extra input": ("M20", lambda m: m.graph.input.append(helper.make_tensor_value_info("x", 1, [1])), "has other inputs"),
    "double input": ("M20", lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 11), "expected float32, found float64"),
    "channels last": ("M20", lambda m: m.graph.input[0].type.tensor_type.shape.dim.reverse(), "another shape than in io.json"),
    "sequence": ("M20", lambda m: m.graph.input[0].type.sequence_type.SetInParent(), "another type"),
    "symbolic batch": ("M21", lambda m: _dim(m, dim_param="N"), "a size that is not fixed .*'N'"),
    "unnamed batch": ("M21", lambda m: m.graph.input[0].type.tensor_type.shape.dim[0].Clear(), "not fixed"),
    "no shape": ("M21", lambda m: m.graph.input[0].type.tensor_type.ClearField("shape"), "not fixed"),
    "batch of 2": ("M21", lambda m: _dim(m, dim_value=2), "another shape"),
    "batch of 0": ("M21", lambda m: _dim(m, dim_value=0), "another shape"),
}


@pytest.mark.parametrize("case", [name for name, (row, *_) in PROMISES.items() if row == "M20"])
def test_M20_interface_that_is_not_the_manifests(case: str, fdti: Fdti) -> None:
    refuse(edited(PROMISES[case][1]), PROMISES[case][2], fdti)


@pytest.mark.parametrize("case", [name for name, (row, *_) in PROMISES.items() if row == "M21"])
def test_M21_batch_that_is_not_static(case: str, fdti: Fdti) -> None:
    refuse(edited(PROMISES[case][1]), PROMISES[case][2], fdti)


# F28, F29: flipped bits.


def test_F28_flipped_weight_bit(tmp_path: Path, fdti: Fdti) -> None:
    def flip(model: ModelProto) -> None:
        replace(model, "w2", lambda array: _flip_bit_30(array))

    root = make_bundle(tmp_path / "b").root
    raw = edited(flip)
    assert accepted_by_onnxruntime(raw), "the flipped file loads and runs: only its hash tells"
    (root / "model.fp32.onnx").write_bytes(raw)
    with fdti.detecting("at opening"), pytest.raises(ArtifactError, match="was altered: sha256 differs"):
        open_bundle(root)


def test_F28_flipped_weight_bit_after_opening(tmp_path: Path, fdti: Fdti) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "b").root)
    path = bundle.artifact.path("model.fp32.onnx")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x40
    path.write_bytes(raw)
    with fdti.detecting("at loading"), pytest.raises(ArtifactError, match="was altered"):
        bundle.model_bytes("fp32")


def _flip_bit_30(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.view(np.uint32).reshape(-1)[5] ^= np.uint32(1 << 30)
    return array


SCALES = [0.0, -0.0, np.nan, np.inf, -np.inf, -0.5, 1e-42]


@pytest.mark.parametrize("value", SCALES)
def test_F29_scale_that_is_no_scale(value: float, fdti: Fdti) -> None:
    name = next(n.input[1] for n in onnx_of(int8_model()).graph.node if n.op_type == "QuantizeLinear")

    def change(model: ModelProto) -> None:
        replace(model, name, lambda array: np.full_like(array, value))

    raw = edited(change, variant="int8-cpu")
    assert accepted_by_onnxruntime(raw)
    refuse(raw, "(not a positive, normal number|no numbers|too small)", fdti, variant="int8-cpu")


def test_F29_one_channel_of_a_weight_scale(tmp_path: Path, fdti: Fdti) -> None:
    def change(model: ModelProto) -> None:
        replace(model, "w2_scale", lambda array: np.where(np.arange(array.size) == 3, np.float32(0), array))

    raw = edited(change, variant="int8-cpu")
    refuse(raw, "not a positive, normal number", fdti, variant="int8-cpu")
    assert "not a positive" in refused_by_runtime(tmp_path, raw, "int8-cpu")


def _five_channels(model: ModelProto) -> None:
    for name in ("w2_scale", "w2_zero_point"):
        replace(model, name, lambda array: array[:5].copy())


ZEROS: dict[str, Any] = {
    "another type": lambda m: initializer(m, "w2_zero_point").CopyFrom(numpy_helper.from_array(np.zeros(8, np.uint8), "w2_zero_point")),
    "too few": lambda m: initializer(m, "w2_zero_point").CopyFrom(numpy_helper.from_array(np.zeros(7, np.int8), "w2_zero_point")),
    "a float": lambda m: initializer(m, "w2_zero_point").CopyFrom(numpy_helper.from_array(np.zeros(8, np.float32), "w2_zero_point")),
    "scales for other channels": lambda m: _five_channels(m),
}


@pytest.mark.parametrize("case", ZEROS)
def test_F29_zero_points_and_channels_that_do_not_fit(case: str, fdti: Fdti) -> None:
    refuse(edited(ZEROS[case], variant="int8-cpu"), "(zero point|number of scales)", fdti, variant="int8-cpu")


# Controls: the same path without a fault.


def onnx_of(raw: bytes) -> ModelProto:
    model: ModelProto = ModelProto.FromString(raw)
    return model


def _passes(tmp_path: Path | None = None) -> None:
    check(fp32_model())
    check(int8_model(), variant="int8-cpu")
    if tmp_path is not None:
        bundle = open_bundle(make_bundle(tmp_path / "good").root)
        for variant in ("fp32", "int8-cpu"):
            backend, report = admit_tier(bundle, variant, 1)
            assert report.admitted, report.reason
            assert backend is not None
            assert backend.run(dict(inputs(1)))


def test_M7_control_embedded_weights_pass(tmp_path: Path) -> None:
    _passes(tmp_path)


def test_M8_control_word_location_in_a_name_passes() -> None:
    check(edited(lambda model: setattr(model, "doc_string", "\n\x08location")))


def test_M9_control_linked_root_folder_passes(tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(make_bundle(tmp_path / "v1").root)
    open_bundle(tmp_path / "current").model_bytes("fp32")


def test_M10_control_values_in_typed_fields_pass() -> None:
    def change(model: ModelProto) -> None:
        tensor = initializer(model, "w1")
        values = numpy_helper.to_array(tensor).ravel().tolist()
        tensor.ClearField("raw_data")
        tensor.float_data.extend(values)

    check(edited(change))


def test_M11_control_no_location_at_all_passes() -> None:
    _passes()


def test_M12_control_exact_bytes_pass() -> None:
    _passes()


def test_M13_control_small_constants_of_shape_pass() -> None:
    def change(model: ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array([4, 4], np.int64), "small"))
        model.graph.node.append(helper.make_node("ConstantOfShape", ["small"], ["some"], "some"))

    check(edited(change))


def test_M14_control_every_exported_operator_is_allowed() -> None:
    from fmdeploy.export.lint.allowed import ALLOWED as EXPORTED
    from fmdeploy.runtime.onnxcheck.operators import ALLOWED

    assert EXPORTED <= ALLOWED


@pytest.mark.parametrize("opset", [17, 20])
def test_M15_control_written_opsets_pass(opset: int) -> None:
    check(edited(lambda model: setattr(model.opset_import[0], "version", opset)))


def test_M16_control_sorted_graph_passes() -> None:
    _passes()


def test_M17_control_graph_without_loops_passes() -> None:
    _passes()


def test_M19_control_fully_quantised_file_passes() -> None:
    pairs = min(sum(n.op_type == kind for n in onnx_of(int8_model()).graph.node) for kind in ("QuantizeLinear", "DequantizeLinear"))
    check(int8_model(), variant="int8-cpu", declared=Declared(True, pairs, ()))


def test_M20_control_right_interface_passes() -> None:
    _passes()


def test_M21_control_static_batch_passes() -> None:
    _passes()


def test_F28_control_untouched_bundle_opens(tmp_path: Path) -> None:
    root = make_bundle(tmp_path / "b").root
    shutil.copytree(root, tmp_path / "copy")
    assert open_bundle(tmp_path / "copy").digest == open_bundle(root).digest
    assert os.stat(tmp_path / "copy" / "io.json").st_nlink == 1


@pytest.mark.parametrize("value", [1e-6, 0.5, 1e6])
def test_F29_control_any_positive_normal_scale_passes(value: float) -> None:
    name = next(n.input[1] for n in onnx_of(int8_model()).graph.node if n.op_type == "QuantizeLinear")
    check(edited(lambda model: replace(model, name, lambda a: np.full_like(a, value)), variant="int8-cpu"), variant="int8-cpu")

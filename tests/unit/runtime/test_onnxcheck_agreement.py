"""Files that two readers may understand differently: what passes the checks is what ONNX Runtime computes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fmdeploy.errors import ModelFileError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.ortsession import ort_session
from fmdeploy.runtime.onnxcheck.checks import check_model
from fmdeploy.runtime.onnxcheck.tensors import Tensor
from support.agreement import agree

IO = IOSpec(inputs=(TensorSpec(name="x", shape=(2,)),), outputs=(TensorSpec(name="y", shape=(2,)),), preprocessing="none")
ONES = np.ones((1, 2), np.float32)
Change = Callable[[ModelProto], object]


def adds(constant: NodeProto | TensorProto, change: Change = lambda model: None) -> bytes:
    """y = x + c, with c from a node or from an initialiser."""
    nodes = [helper.make_node("Add", ["x", "c"], ["y"], "add")]
    stored = [constant] if isinstance(constant, TensorProto) else []
    graph = helper.make_graph([constant, *nodes] if not stored else nodes, "g", [helper.make_tensor_value_info("x", 1, [1, 2])],
                              [helper.make_tensor_value_info("y", 1, [1, 2])], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    change(model)
    raw: bytes = model.SerializeToString()
    return raw


def constant_node(*attributes: AttributeProto) -> NodeProto:
    node = helper.make_node("Constant", [], ["c"], "c")
    node.attribute.extend(attributes)
    return node


def attribute(name: str, kind: int, **values: Any) -> AttributeProto:
    made = AttributeProto(name=name, type=kind)  # type: ignore[arg-type]
    for field, value in values.items():
        if isinstance(value, TensorProto):
            getattr(made, field).CopyFrom(value)
        elif isinstance(value, list):
            getattr(made, field).extend(value)
        else:
            setattr(made, field, value)
    return made


def one(value: float, name: str = "c") -> TensorProto:
    return numpy_helper.from_array(np.array([value], np.float32), name)


def seen_here(raw: bytes) -> np.ndarray[Any, Any] | None:
    """The constant as the checks see it; None where they refuse the file."""
    try:
        model = check_model(raw, IO, where="file.onnx")
    except ModelFileError:
        return None
    if model.graph.initializers:
        return model.graph.initializers[0].array
    value = next(iter(model.graph.nodes[0].attributes.values()))
    return value.array if isinstance(value, Tensor) else np.asarray(value)


def computed(raw: bytes) -> np.ndarray[Any, Any] | None:
    """The constant as plain ONNX Runtime computes with it; None where it refuses the file."""
    try:
        session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
        result: np.ndarray[Any, Any] = session.run(None, {"x": ONES})[0] - ONES
    except Exception:
        return None
    return result


def typed(kind: int, **data: Any) -> TensorProto:
    tensor = TensorProto(name="c", data_type=kind, dims=[1])
    for field, value in data.items():
        if isinstance(value, list):
            getattr(tensor, field).extend(value)
        else:
            setattr(tensor, field, value)
    return tensor


def field(number: int, raw: bytes) -> bytes:
    assert len(raw) < 1 << 14
    size = bytes([len(raw)]) if len(raw) < 128 else bytes([len(raw) & 127 | 128, len(raw) >> 7])
    return bytes([number << 3 | 2]) + size + raw


def spliced(tensor: bytes) -> bytes:
    """The same network, with an initialiser of these very bytes."""
    model = ModelProto.FromString(adds(one(2)))
    model.graph.ClearField("initializer")
    graph = model.graph.SerializeToString() + field(5, tensor)
    model.ClearField("graph")
    rest: bytes = model.SerializeToString()
    return rest + field(7, graph)


NAMED, FLOAT2 = b"\x42\x01c", b"\x25" + np.float32(2).tobytes()
RAW2 = np.float32(2).tobytes()
FILES: dict[str, bytes] = {
    "plain tensor": adds(one(2)), "plain bytes": spliced(NAMED + b"\x08\x01\x10\x01" + FLOAT2), "plain node": adds(constant_node(helper.make_attribute("value", one(2)))),
    "plain number": adds(constant_node(helper.make_attribute("value_float", 2.0))),
    "typed floats": adds(typed(1, float_data=[2.0])),
    "two attributes, number first": adds(constant_node(helper.make_attribute("value_float", 7.0), helper.make_attribute("value", one(2)))),
    "two attributes, tensor first": adds(constant_node(helper.make_attribute("value", one(2)), helper.make_attribute("value_float", 7.0))),
    "other attribute first": adds(constant_node(helper.make_attribute("odd", one(7)), helper.make_attribute("value", one(2)))),
    "attribute of another name": adds(constant_node(helper.make_attribute("odd", one(7)))),
    "type says list, holds number": adds(constant_node(attribute("value_float", AttributeProto.FLOATS, f=2.0))),
    "type says number, holds list": adds(constant_node(attribute("value_floats", AttributeProto.FLOAT, floats=[2.0]))),
    "type says tensor, holds number": adds(constant_node(attribute("value", AttributeProto.TENSOR, f=2.0))),
    "tensor and number in one attribute": adds(constant_node(attribute("value", AttributeProto.TENSOR, t=one(2), f=7.0))),
    "tensor and list in one attribute": adds(constant_node(attribute("value", AttributeProto.TENSOR, t=one(2), tensors=[one(7)]))),
    "number without a value": adds(constant_node(attribute("value_float", AttributeProto.FLOAT))),
    "attribute without a type": adds(constant_node(attribute("value_float", AttributeProto.UNDEFINED, f=2.0))),
    "raw and typed": adds(typed(1, raw_data=RAW2, float_data=[7.0])),
    "typed in the wrong field": adds(typed(1, int32_data=[2])), "two typed fields": adds(typed(1, float_data=[2.0], int64_data=[7])),
    "no data": adds(typed(1)), "too much data": adds(typed(1, float_data=[2.0, 7.0])),
    "float16 in int32_data": adds(typed(10, int32_data=[0x4000])), "bfloat16": adds(typed(16, int32_data=[0x4000])),
    "int4": adds(typed(22, int32_data=[2])), "complex": adds(typed(14, float_data=[2.0, 0.0])),
    "data type of 2^32 and 1": spliced(NAMED + b"\x08\x01\x10\x81\x80\x80\x80\x10" + FLOAT2),
    "overlong data type": spliced(NAMED + b"\x08\x01\x10\x81\x80\x00" + FLOAT2),
    "dims packed and not": spliced(NAMED + b"\x0a\x01\x01\x08\x02\x10\x01" + FLOAT2 + b"\x25\x00\x00\xe0\x40"),
    "data type twice": spliced(NAMED + b"\x08\x01\x10\x01\x10\x01" + FLOAT2),
    "name twice": spliced(NAMED + b"\x08\x01\x10\x01" + FLOAT2 + b"\x42\x01d"),
    "dims as a fixed number": spliced(NAMED + b"\x0d\x01\x00\x00\x00\x10\x01" + FLOAT2),
    "dims longer than 64 bits": spliced(NAMED + b"\x08\x81" + b"\x80" * 8 + b"\x7e\x10\x01" + FLOAT2),
    "packed dims longer than 64 bits": spliced(NAMED + b"\x0a\x0a\x81" + b"\x80" * 8 + b"\x7e\x10\x01" + FLOAT2),
    "group inside": spliced(NAMED + b"\x08\x01\x10\x01" + FLOAT2 + b"\xa3\x06\xa4\x06"),
    "unknown field": spliced(NAMED + b"\x08\x01\x10\x01" + FLOAT2 + b"\xa0\x06\x01"),
    "segment": spliced(NAMED + b"\x08\x01\x10\x01" + FLOAT2 + b"\x1a\x00"),
    "location in an attribute": adds(constant_node(attribute("value", AttributeProto.TENSOR, t=typed(1, raw_data=RAW2, data_location=1)))),
    "second graph merged": adds(one(2)) + ModelProto(graph=onnx.GraphProto(initializer=[one(7, "d")])).SerializeToString(),
    "second initialiser of the name": adds(one(2), lambda m: m.graph.initializer.append(one(7))),
    "constant shadows an initialiser": adds(one(2), lambda m: m.graph.node.insert(0, constant_node(helper.make_attribute("value", one(7))))),
    "initialiser is an input": adds(one(2), lambda m: m.graph.input.append(helper.make_tensor_value_info("c", 1, [1]))),
    "sparse initialiser": adds(constant_node(helper.make_attribute("value", one(2))), lambda m: m.graph.sparse_initializer.add(dims=[1])),
    "function of the operator's name": adds(one(2), lambda m: m.functions.append(helper.make_function(
        "", "Add", ["a", "b"], ["c"], [helper.make_node("Sub", ["a", "b"], ["c"])], [helper.make_opsetid("", 17)]))),
    "two opsets": adds(one(2), lambda m: m.opset_import.append(helper.make_opsetid("", 13))),
    "the opset twice": adds(one(2), lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 17))),
    "training information": adds(one(2), lambda m: m.training_info.add()),
    "quantisation annotation": adds(one(2), lambda m: m.graph.quantization_annotation.add(tensor_name="c")),
    "metadata": adds(one(2), lambda m: m.metadata_props.add(key="ort_config", value='{"session_options": {"intra_op_num_threads": 9}}')),
    "node without outputs": adds(one(2), lambda m: m.graph.node.append(helper.make_node("Identity", ["x"], []))),
    "empty dims": adds(one(2), lambda m: m.graph.initializer[0].ClearField("dims")),
    "dims of zero": adds(one(2), lambda m: m.graph.initializer[0].dims.append(0)),
}
MUST_PASS = ("plain tensor", "plain bytes", "dims packed and not", "plain node", "plain number", "typed floats", "number without a value", "overlong data type",
             "the opset twice", "quantisation annotation", "metadata", "empty dims")


@pytest.mark.parametrize("case", FILES)
def test_what_passes_is_what_is_computed(case: str) -> None:
    ours, theirs = seen_here(FILES[case]), computed(FILES[case])
    if case in MUST_PASS:
        assert ours is not None
    if ours is not None and theirs is not None:
        assert np.array_equal(np.broadcast_to(ours, theirs.shape), theirs)


def test_control_onnxruntime_takes_the_first_of_two_attributes() -> None:
    for case, value in (("two attributes, number first", 7), ("two attributes, tensor first", 2)):
        found = computed(FILES[case])
        assert found is not None
        assert found.ravel().tolist() == [value, value]
        assert seen_here(FILES[case]) is None


def test_numbers_are_cut_to_32_bits_before_a_bool_is_made_of_them() -> None:
    agree(spliced(NAMED + b"\x08\x01\x10\x09\x2a\x05\x80\x80\x80\x80\x10"))  # 2^32, which protobuf reads as 0


def marked(mark: str) -> bytes:
    raw = adds(one(2), lambda model: model.ClearField("producer_name"))
    assert raw[:2] == b"\x08\x08"
    return raw[:2] + b"\x12\x04" + mark.encode() + raw[2:]


@pytest.mark.parametrize("mark", ["ORTM", "TFL3"])
def test_file_of_two_formats_is_refused(mark: str) -> None:
    raw = marked(mark)
    assert ModelProto.FromString(raw).producer_name == mark
    with pytest.raises(ModelFileError, match="mark of another format"):
        check_model(raw, IO, where="file.onnx")


def test_sessions_read_onnx_and_nothing_else() -> None:
    raw = marked("ORTM")
    with pytest.raises(Exception, match="ORT model"):  # what plain ONNX Runtime takes it for
        onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    assert ort_session(raw).run(None, {"x": ONES})[0].tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("op_type", ["QLinearMatMul", "QLinearConv"])
@pytest.mark.parametrize("at", [1, 4, 6])
def test_scales_inside_integer_operators_are_checked(op_type: str, at: int) -> None:
    def stored(name: str, array: np.ndarray[Any, Any]) -> TensorProto:
        return numpy_helper.from_array(array, name)

    shape, weight = ((1, 1, 2), (1, 1, 1)) if op_type == "QLinearConv" else ((1, 2), (2, 2))
    scales = {k: np.array(0.1 if k != at else 0.0, np.float32) for k in (1, 4, 6)}
    names = ["q", "s1", "z", "w", "s4", "z", "s6", "z"]
    nodes = [helper.make_node("QuantizeLinear", ["x", "one", "z"], ["q0"], "q0"), helper.make_node("Reshape", ["q0", "shape"], ["q"], "r0"),
             helper.make_node(op_type, names, ["p"], "product"), helper.make_node("Reshape", ["p", "back"], ["p1"], "r1"),
             helper.make_node("DequantizeLinear", ["p1", "one", "z"], ["y"], "dq")]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 1, [1, 2])], [helper.make_tensor_value_info("y", 1, [1, 2])],
                              [stored("one", np.array(1, np.float32)), stored("z", np.array(0, np.uint8)), stored("w", np.ones(weight, np.uint8)),
                               stored("shape", np.array(shape)), stored("back", np.array([1, 2])), *(stored(f"s{k}", v) for k, v in scales.items())])
    raw = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    assert computed(raw) is not None
    with pytest.raises(ModelFileError, match="not a positive, normal number"):
        check_model(raw, IO, where="file.onnx")

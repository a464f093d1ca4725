"""The device's ONNX reader: it agrees with onnx on every file, and nothing that is not ONNX gets more than a typed error."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fmdeploy.errors import ModelFileError
from fmdeploy.runtime.onnxcheck import fields as known
from fmdeploy.runtime.onnxcheck.graphview import tensors_of
from fmdeploy.runtime.onnxcheck.model import parse_model
from fmdeploy.runtime.onnxcheck.wire import Budget, Fields, integers, read_message, varint
from support.agreement import agree
from support.badfiles import check
from support.bundles import fp32_model, int8_model
from support.onnxgraphs import quantised_convs

MESSAGES: list[tuple[Any, Fields]] = [
    (onnx.ModelProto, known.MODEL), (onnx.GraphProto, known.GRAPH), (onnx.NodeProto, known.NODE),
    (onnx.AttributeProto, known.ATTRIBUTE), (onnx.TensorProto, known.TENSOR), (onnx.ValueInfoProto, known.VALUE_INFO),
    (onnx.TypeProto, known.TYPE), (onnx.TypeProto.Tensor, known.TENSOR_TYPE), (onnx.TensorShapeProto, known.SHAPE),
    (onnx.TensorShapeProto.Dimension, known.DIM), (onnx.OperatorSetIdProto, known.OPSET),
]
WIRES = {"FLOAT": 5, "DOUBLE": 1, "INT32": 0, "INT64": 0, "UINT64": 0, "ENUM": 0, "STRING": 2, "BYTES": 2, "MESSAGE": 2}


@pytest.mark.parametrize(("message", "fields"), MESSAGES, ids=lambda x: getattr(x, "__name__", ""))
def test_fields_are_those_of_onnx(message: Any, fields: Fields) -> None:
    names = {getattr(message.DESCRIPTOR.fields[0], f"TYPE_{name}"): wire for name, wire in WIRES.items()}
    theirs = {f.number: (f.name, names[f.type], f.is_repeated) for f in message.DESCRIPTOR.fields}
    assert {number: tuple(field) for number, field in fields.items()} == theirs


def typed_values() -> bytes:
    """Values in every typed field, and attributes of every plain kind."""
    tensors = [helper.make_tensor(f"t{kind}", kind, [2, 2], values) for kind, values in (
        (TensorProto.FLOAT, [1.5, -2.0, 0.0, 3e38]), (TensorProto.INT8, [-128, 127, 0, -1]), (TensorProto.UINT8, [0, 255, 1, 2]),
        (TensorProto.INT32, [-(2**31), 2**31 - 1, 0, -1]), (TensorProto.INT64, [-(2**63), 2**63 - 1, 0, -1]),
        (TensorProto.DOUBLE, [1e300, -1e-300, 0.0, 1.0]), (TensorProto.UINT64, [0, 2**64 - 1, 2**63, 1]),
        (TensorProto.FLOAT16, [1.0, -0.5, 6e-8, 65504.0]), (TensorProto.BOOL, [True, False, True, True]),
        (TensorProto.INT16, [-32768, 32767, 0, 1]), (TensorProto.UINT16, [0, 65535, 1, 2]), (TensorProto.UINT32, [0, 2**32 - 1, 1, 2]))]
    node = helper.make_node("Relu", ["x"], ["y"], f=0.5, i=-(2**63), s="text", ints=[-1, 2**62], floats=[1.0, -2.0],
                            strings=["a", "b"], empty="", t=numpy_helper.from_array(np.arange(3)))
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", 1, [1, "N", None, 0])],
                              [helper.make_tensor_value_info("y", 1, None)], tensors)
    raw: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("x", 3)],
                                   ir_version=8).SerializeToString()
    return raw


@functools.cache
def foreign() -> dict[str, bytes]:
    """Files written by hand and by onnxruntime's quantiser; those of the exporter are read in tests/integration."""
    return {"fp32": fp32_model(), "int8-cpu": int8_model(), "qdq": quantised_convs(3, residual=True).SerializeToString(),
            "typed": typed_values()}


NAMES = ("fp32", "int8-cpu", "qdq", "typed")


@pytest.mark.parametrize("name", NAMES)
def test_reads_what_onnx_reads(name: str) -> None:
    agree(foreign()[name])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50))
def test_packed_numbers_are_protobufs(numbers: list[int]) -> None:
    raw = TensorProto(dims=numbers, int64_data=numbers).SerializeToString()
    found = read_message(memoryview(raw), known.TENSOR, Budget())
    assert integers(found.get("dims", []), Budget()) == numbers
    assert integers(found.get("int64_data", []), Budget()) == numbers


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_give_a_model_or_a_typed_error(raw: bytes) -> None:
    only_typed(lambda: parse_model(raw))
    only_typed(lambda: check(raw))


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    raw = bytearray(draw(st.sampled_from((fp32_model(width=2), int8_model(width=2), typed_values()))))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(raw)))
        how = draw(st.integers(0, 3))
        if how == 0:
            raw[at:at] = draw(st.binary(max_size=12))
        elif how == 1:
            del raw[at : at + draw(st.integers(1, 40))]
        elif how == 2 and at < len(raw):
            raw[at] = draw(st.integers(0, 255))
        else:
            raw[at:at] = raw[at : at + draw(st.integers(1, 40))]
    return bytes(raw)


@settings(max_examples=150, deadline=None)
@given(mutants())
def test_mutated_files_give_a_model_or_a_typed_error(raw: bytes) -> None:
    start = time.perf_counter()
    only_typed(lambda: [tensor.array for tensor in tensors_of(parse_model(raw).graph)])
    for variant in ("fp32", "int8-cpu"):
        only_typed(lambda variant=variant: check(raw, variant=variant))  # type: ignore[misc]
    assert time.perf_counter() - start < 2


def only_typed(act: Callable[[], object]) -> None:
    said = ""
    try:
        act()
    except ModelFileError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 2000


HOSTILE: dict[str, bytes] = {
    "many empty nodes": b"\x3a" + b"\x80\x89\x7a" + b"\x0a\x00" * 1_000_000, "endless number": b"\x08" + b"\xff" * 11,
    "length of 2^63": b"\x3a" + b"\xff" * 9 + b"\x7f", "group": b"\x3b\x3c", "field 0": b"\x00\x00", "field 2^28": b"\xff\xff\xff\xff\x0f\x00",
    "two graphs": b"\x3a\x00\x3a\x00", "graph as number": b"\x38\x05",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes_are_refused_in_time(case: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ModelFileError):
        check(HOSTILE[case])
    assert time.perf_counter() - start < 15


def test_graphs_inside_graphs_are_never_walked() -> None:
    inner = b""
    for _ in range(20_000):  # node { attribute { g { node { ... } } } }
        inner = _field(1, _field(5, _field(6, inner)))
    start = time.perf_counter()
    with pytest.raises(ModelFileError, match="control flow|no network|IR version"):
        check(_field(8, b"\x10\x11") + b"\x08\x08" + _field(7, inner))
    assert time.perf_counter() - start < 5


def _field(number: int, raw: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(raw)) + raw


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_varint_round_trip(value: int) -> None:
    assert varint(memoryview(_varint(value)), 0) == (value, len(_varint(value)))


def chain(length: int) -> Iterator[onnx.NodeProto]:
    for k in range(length):
        yield helper.make_node("Relu", [f"x{k}"], [f"x{k + 1}"], f"n{k}")


def test_time_grows_with_the_file_and_not_faster() -> None:
    def seconds(length: int, backwards: bool) -> float:
        nodes = list(chain(length))
        graph = helper.make_graph(nodes[::-1] if backwards else nodes, "g", [helper.make_tensor_value_info("x0", 1, [1])],
                                  [helper.make_tensor_value_info(f"x{length}", 1, [1])])
        raw = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
        start = time.perf_counter()
        with pytest.raises(ModelFileError, match="before it is made|other inputs"):
            check(raw)
        return time.perf_counter() - start

    for backwards in (False, True):
        assert seconds(8_000, backwards) < 20 * seconds(2_000, backwards) + 0.5


@pytest.mark.parametrize("variant", ["fp32", "int8-cpu"])
def test_checks_cost_less_than_a_session(variant: str) -> None:
    import onnxruntime

    raw = fp32_model() if variant == "fp32" else int8_model()
    ours, theirs = [], []
    for _ in range(5):
        start = time.perf_counter()
        check(raw, variant=variant)
        middle = time.perf_counter()
        onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
        ours.append(middle - start)
        theirs.append(time.perf_counter() - middle)
    print(f"checks {1e3 * min(ours):.2f} ms, session {1e3 * min(theirs):.2f} ms")
    assert min(ours) < 0.03

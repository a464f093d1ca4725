"""Rules on shapes, types and versions."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from fmdeploy.export.lint.finding import Rule, Subject, Where
from fmdeploy.export.lint.numbers import TRT_CHECK

OLDEST, NEWEST = 13, 20  # per-channel Q/DQ came with 13; TensorRT 10.3 on JetPack 6 documents up to 20
# Types of which TensorRT-RTX 1.7.1.116 imports no tensor.
REFUSED_TYPES: dict[int, str] = {TensorProto.INT16: "int16", TensorProto.UINT16: "uint16", TensorProto.UINT32: "uint32",
                 TensorProto.UINT64: "uint64", TensorProto.STRING: "string", TensorProto.COMPLEX64: "complex64",
                 TensorProto.COMPLEX128: "complex128"}
RUN_TIME = ("Shape", "Size", "ConstantOfShape", "Range", "TopK", "NonMaxSuppression")


def _dynamic(subject: Subject) -> Iterator[tuple[Where, str]]:
    for value in subject.free_inputs:
        shape = subject.shape(value.name)
        if shape is None or None in shape:
            axes = value.type.tensor_type.shape.dim
            names = [axis.dim_param or "?" for axis in axes if not axis.HasField("dim_value")]
            yield value.name, f"axes {', '.join(names)}" if names else "unknown rank"


def _int64_io(subject: Subject) -> Iterator[tuple[Where, str]]:
    for name in (*(value.name for value in subject.free_inputs), *subject.outputs):
        if subject.kind(name) == TensorProto.INT64:
            yield name, ""


def _int64_shapes(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes(*RUN_TIME):
        if node.op_type != "ConstantOfShape" or node.input[0] not in subject.constants:
            yield subject.called(node), node.op_type


def _types(subject: Subject) -> Iterator[tuple[Where, str]]:
    for name, kind in subject.kinds.items():
        if kind in REFUSED_TYPES:
            yield name, REFUSED_TYPES[kind]


def _double(subject: Subject) -> Iterator[tuple[Where, str]]:
    for name, kind in subject.kinds.items():
        if kind == TensorProto.DOUBLE:
            yield name, ""


def _old(subject: Subject) -> Iterator[tuple[Where, str]]:
    if subject.opset < OLDEST:
        yield "opset", f"found {subject.opset}"


def _new(subject: Subject) -> Iterator[tuple[Where, str]]:
    if subject.opset > NEWEST:
        yield "opset", f"found {subject.opset}"


def _stored_inputs(subject: Subject) -> Iterator[tuple[Where, str]]:
    stored = {tensor.name for tensor in subject.model.graph.initializer}
    for name in subject.inputs:
        if name in stored:
            yield name, ""


def _half_on_cpu(subject: Subject) -> Iterator[tuple[Where, str]]:
    count = sum(kind == TensorProto.FLOAT16 for kind in subject.kinds.values())
    if count:
        yield "graph", f"{count} tensors"


RULES = (
    Rule("FMD301", "input of dynamic shape", {"tensorrt": "risky", "dla": "refused", "ort": "note"},
         "TensorRT needs an optimisation profile to build it, and tunes for one size; the DLA takes static shapes only",
         "Export with static shapes, batch 1", _dynamic,
         "docs.nvidia.com: working with dynamic shapes, DLA restrictions"),
    Rule("FMD302", "INT64 input or output", {"tensorrt": "risky", "dla": "refused"},
         "TensorRT before 10 turns it into INT32, later ones want an INT64 binding: callers break by version",
         "Hand over int32 or float32", _int64_io, TRT_CHECK + ": warns of the binding"),
    Rule("FMD303", "shape or size computed at run time", {"tensorrt": "risky", "dla": "slow", "ort": "note"},
         "INT64 arithmetic on shapes splits the engine, and sizes that depend on data need allocations while it runs",
         "Export with static shapes and simplify: the arithmetic folds away", _int64_shapes,
         "docs.nvidia.com: working with dynamic shapes"),
    Rule("FMD304", "type that TensorRT does not import", {"tensorrt": "refused", "dla": "refused"},
         "TensorRT's parser has no such type", "Use float32, float16, int8, int32 or int64", _types, TRT_CHECK),
    Rule("FMD305", "double precision", {"tensorrt": "slow", "dla": "slow", "ort": "slow"},
         "TensorRT takes it, narrowed to FP32 where a version likes to; no kernel on an Orin is fast in it",
         "Export in float32", _double, TRT_CHECK + ": accepted"),
    Rule("FMD306", "opset below 13", {"tensorrt": "risky", "dla": "risky", "ort": "risky"},
         "QuantizeLinear has one scale a tensor only, and other operators changed their inputs since",
         "Export with opset 17 to 20", _old, "onnx.ai: changelog of QuantizeLinear"),
    Rule("FMD307", "opset above 20", {"tensorrt": "risky", "dla": "risky"},
         "TensorRT 10.3 of JetPack 6 documents opsets 9 to 20; newer forms of an operator may be refused there",
         "Export with opset 17 to 20", _new, "github.com/onnx/onnx-tensorrt: docs/operators.md of 10.3"),
    Rule("FMD308", "initialiser that is also an input", {"tensorrt": "note", "ort": "slow"},
         "a weight that a caller may replace is no constant: ONNX Runtime folds and fuses nothing with it",
         "Export with IR version 4 or later, keep_initializers_as_inputs=False", _stored_inputs,
         "onnxruntime.ai: graph optimisations"),
    Rule("FMD309", "FP16 on a CPU", {"ort": "slow"},
         "ONNX Runtime's CPU kernels compute FP16 in FP32, behind casts", "Run the FP32 or the int8-cpu file there",
         _half_on_cpu, "onnxruntime.ai: operator kernels of the CPU provider"),
)

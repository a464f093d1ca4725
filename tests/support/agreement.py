"""The device's ONNX reader against the onnx package: the same nodes, names, numbers."""

from __future__ import annotations

from typing import Any

from onnx import ModelProto, TensorProto, helper, numpy_helper

from fmdeploy.runtime.onnxcheck.model import Value, parse_model
from fmdeploy.runtime.onnxcheck.tensors import Tensor


def agree(raw: bytes) -> None:
    theirs, ours = ModelProto.FromString(raw), parse_model(raw)
    assert ours.ir_version == theirs.ir_version
    assert ours.opsets == tuple((o.domain, o.version) for o in theirs.opset_import)
    assert ours.num_functions == len(theirs.functions)
    for mine, node in zip(ours.graph.nodes, theirs.graph.node, strict=True):
        assert (mine.op_type, mine.domain, mine.name) == (node.op_type, node.domain, node.name)
        assert (mine.inputs, mine.outputs) == (tuple(node.input), tuple(node.output))
        assert set(mine.attributes) == {a.name for a in node.attribute}
        for attribute in node.attribute:
            same_value(mine.attributes[attribute.name], helper.get_attribute_value(attribute))
    for stored, tensor in zip(ours.graph.initializers, theirs.graph.initializer, strict=True):
        same_tensor(stored, tensor)
    for ours_, theirs_ in ((ours.graph.inputs, theirs.graph.input), (ours.graph.outputs, theirs.graph.output),
                           (ours.graph.values, theirs.graph.value_info)):
        for value, proto in zip(ours_, theirs_, strict=True):
            same_declared(value, proto)


def same_value(mine: Any, theirs: Any) -> None:
    if isinstance(theirs, TensorProto):
        same_tensor(mine, theirs)
    else:
        assert mine == (list(theirs) if isinstance(mine, list) else theirs)


def same_tensor(mine: Tensor, theirs: TensorProto) -> None:
    assert (mine.name, mine.dims, mine.data_type) == (theirs.name, tuple(theirs.dims), theirs.data_type)
    expected = numpy_helper.to_array(theirs)
    assert mine.array.dtype == expected.dtype
    assert mine.array.tobytes() == expected.tobytes()


def same_declared(mine: Value, theirs: Any) -> None:
    kind = theirs.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else d.dim_param if d.HasField("dim_param") else None for d in kind.shape.dim]
    assert (mine.name, mine.elem_type) == (theirs.name, kind.elem_type)
    assert mine.dims == (tuple(dims) if kind.HasField("shape") else None)

"""Reading and editing ONNX graphs: the few verbs that the other modules of this folder share."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from fmdeploy.errors import ModelFileError

Array = np.ndarray[Any, Any]
Q, DQ = "QuantizeLinear", "DequantizeLinear"


class Graph:
    """An ONNX model with its lookups: who makes a tensor, who reads it, which ones are constants."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.refresh()

    def refresh(self) -> None:
        """Build the lookups again after nodes or initialisers were added or removed."""
        graph = self.model.graph
        self.constants: dict[str, Array] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.maker: dict[str, NodeProto] = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.inputs = [value.name for value in graph.input]
        self.outputs = [value.name for value in graph.output]

    def nodes(self, *op_types: str) -> list[NodeProto]:
        """Return the nodes of these types in graph order."""
        return [node for node in self.model.graph.node if node.op_type in op_types]

    def set_constant(self, name: str, value: Array) -> str:
        """Add or replace the initialiser `name`; returns the name."""
        self.drop_constants({name})
        self.model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape),
                                                                    name))
        self.constants[name] = value
        return name

    def drop_constants(self, names: set[str]) -> None:
        """Remove initialisers."""
        keep = [t for t in self.model.graph.initializer if t.name not in names]
        if len(keep) != len(self.model.graph.initializer):
            del self.model.graph.initializer[:]
            self.model.graph.initializer.extend(keep)

    def remove(self, gone: list[NodeProto]) -> None:
        """Remove nodes and refresh the lookups."""
        outputs = {tuple(node.output) for node in gone}
        keep = [node for node in self.model.graph.node if tuple(node.output) not in outputs]
        del self.model.graph.node[:]
        self.model.graph.node.extend(keep)
        self.refresh()

    def redirect(self, old: str, new: str) -> None:
        """Make every reader of the tensor `old` read `new`."""
        for node in self.model.graph.node:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new

    def drop_unused(self) -> None:
        """Remove initialisers that nobody reads and the shapes that onnxsim noted for dead tensors."""
        self.refresh()
        used = {name for node in self.model.graph.node for name in node.input} | set(self.outputs)
        self.drop_constants({t.name for t in self.model.graph.initializer} - used)
        del self.model.graph.value_info[:]
        self.refresh()


def op_counts(model: ModelProto) -> Counter[str]:
    """Count nodes by type; types outside the ONNX domain carry it, as in "com.microsoft.QLinearAdd"."""
    return Counter(f"{n.domain}.{n.op_type}" if n.domain not in ("", "ai.onnx") else n.op_type
                   for n in model.graph.node)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Return an attribute's value, or `default` where the node has none."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def load_model(path: Path) -> ModelProto:
    """Read and check a single-file ONNX model.

    Raises:
        ModelFileError: it is missing, not ONNX, invalid, or keeps weights in other files.
    """
    if not path.is_file():
        raise ModelFileError("no such model file", where=path)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own DecodeError, onnx several others
        raise ModelFileError(f"is not an ONNX model: {str(error).splitlines()[0][:80]}", where=path) from error
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer):
        raise ModelFileError("keeps its weights in other files", where=path, fix="Save it as a single file")
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ModelFileError(f"is not valid ONNX: {str(error).splitlines()[0][:120]}", where=path) from error
    return model


def save_model(model: ModelProto, path: Path) -> None:
    """Write `model` as a single file, with the same bytes for the same graph."""
    path.write_bytes(model.SerializeToString(deterministic=True))

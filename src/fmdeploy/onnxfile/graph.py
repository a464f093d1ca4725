"""Reading and editing ONNX graphs: the few verbs that the other modules of this folder share."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

Array = np.ndarray[Any, Any]
Q, DQ = "QuantizeLinear", "DequantizeLinear"


class Constants(MutableMapping[str, Array]):
    """Initialisers by name, decoded when they are asked for: a graph is looked at far more often than its weights."""

    def __init__(self, tensors: Iterable[TensorProto]) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._arrays: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        if name not in self._arrays:
            self._arrays[name] = numpy_helper.to_array(self._tensors[name])
        return self._arrays[name]

    def __setitem__(self, name: str, value: Array) -> None:
        self._arrays[name] = value

    def __delitem__(self, name: str) -> None:
        known = name in self
        self._arrays.pop(name, None)
        self._tensors.pop(name, None)
        if not known:
            raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in self._arrays or name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter({**self._tensors, **self._arrays})

    def __len__(self) -> int:
        return len(self._tensors.keys() | self._arrays.keys())


class Graph:
    """An ONNX model with its lookups: who makes a tensor, who reads it, which ones are constants."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.refresh()

    def refresh(self) -> None:
        """Build the lookups again after nodes or initialisers were added or removed."""
        graph = self.model.graph
        self.constants: MutableMapping[str, Array] = Constants(graph.initializer)
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
        tensor = numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
        stored = next((old for old in self.model.graph.initializer if old.name == name), None)
        if stored is None:
            self.model.graph.initializer.append(tensor)
        else:  # in place: building the list again copies every weight of the model
            stored.CopyFrom(tensor)
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


def along(values: Array, rank: int, axis: int) -> Array:
    """Shape scales or zero points, one () or one a channel (C,), so that they broadcast along `axis`."""
    if values.size == 1:
        return values.reshape(())
    shape = [1] * rank
    shape[axis if rank > 1 else 0] = -1
    return values.reshape(shape)


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


def save_model(model: ModelProto, path: Path) -> None:
    """Write `model` as a single file, with the same bytes for the same graph."""
    path.write_bytes(model.SerializeToString(deterministic=True))

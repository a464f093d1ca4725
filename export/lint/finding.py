"""What a rule is, and what it says about a node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto

from fmdeploy.onnxfile.graph import Graph
from fmdeploy.onnxfile.header import opset_of
from fmdeploy.onnxfile.tidy import constant_value

Target = Literal["tensorrt", "dla", "ort"]
Severity = Literal["error", "warning", "info"]
Effect = Literal["refused", "wrong", "slow", "risky", "note"]
"""What happens on the target: it does not build; it builds and computes something else; it is slower than it could be;
it builds on some versions or breaks by small changes; good to know."""


@dataclass(frozen=True)
class Finding:
    """One rule broken at one node; `node` is a node's, a tensor's or an input's name."""

    id: str
    node: str
    severity: Severity
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.id} {self.severity} {self.node}: {self.why}. {self.fix}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"id": self.id, "node": self.node, "severity": self.severity, "why": self.why, "fix": self.fix}


class Subject(Graph):
    """The graph that is judged, with the type and shape of every tensor. Rules do not change it."""

    def refresh(self) -> None:
        """Build the lookups; Constant nodes count as constants."""
        super().refresh()
        for node in self.nodes("Constant"):
            value = constant_value(node)
            if value is not None:
                self.constants[node.output[0]] = value
        known = onnx.shape_inference.infer_shapes(self.model).graph
        self.values: dict[str, ValueInfoProto] = {
            value.name: value for value in (*known.input, *known.value_info, *known.output)}
        stored = {tensor.name for tensor in self.model.graph.initializer}
        self.free_inputs = [value for value in self.model.graph.input if value.name not in stored]
        self.kinds: dict[str, int] = {name: v.type.tensor_type.elem_type for name, v in self.values.items()}
        self.kinds |= {tensor.name: tensor.data_type for tensor in self.model.graph.initializer}

    @property
    def opset(self) -> int:
        """Version of the ONNX operator set."""
        return opset_of(self.model)

    def kind(self, tensor: str) -> int:
        """Element type of a tensor (`TensorProto.FLOAT`, …), 0 where unknown."""
        return self.kinds.get(tensor, TensorProto.UNDEFINED)

    def shape(self, tensor: str) -> tuple[int | None, ...] | None:
        """Sizes of a tensor's axes, None where dynamic; None for an unknown rank."""
        if tensor in self.constants:
            return tuple(map(int, self.constants[tensor].shape))
        value = self.values.get(tensor)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        return tuple(axis.dim_value if axis.HasField("dim_value") else None
                     for axis in value.type.tensor_type.shape.dim)

    def made_by(self, tensor: str, *op_types: str) -> NodeProto | None:
        """The node that makes `tensor`, if it is one of these types (any, where none is named)."""
        node = self.maker.get(tensor)
        return node if node is not None and (not op_types or node.op_type in op_types) else None

    def called(self, node: NodeProto) -> str:
        """A node's name, or its first output where it has none."""
        return node.name or next(iter(node.output), node.op_type)


Where = str
Check = Callable[[Subject], Iterator[tuple[Where, str]]]
"""Yields the name of each place that breaks a rule, and what was found there (may be empty)."""


@dataclass(frozen=True)
class Rule:
    """One row of the table of rules."""

    id: str
    title: str
    effect: dict[Target, Effect]
    """What it does on each target; targets that do not mind are left out."""
    why: str
    fix: str
    check: Check
    source: str = ""
    """Where it was measured or reported."""

    def severity(self, target: Target) -> Severity | None:
        """How bad it is for `target`; None where that one does not mind."""
        effect = self.effect.get(target)
        if effect is None:
            return None
        return "error" if effect in ("refused", "wrong") else "info" if effect == "note" else "warning"

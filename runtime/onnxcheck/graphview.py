"""Who makes and who reads a tensor, and which tensors are constants."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.errors import ModelFileError
from fmdeploy.runtime.onnxcheck.model import Graph, Model, Node
from fmdeploy.runtime.onnxcheck.operators import DQ, MOVES, PRODUCTS, Q
from fmdeploy.runtime.onnxcheck.tensors import Tensor

MAX_STEPS = 64  # of a walk through operators that only move numbers


class Product(NamedTuple):
    """A convolution or matrix product, and whether its two operands come from a DequantizeLinear."""

    node: Node
    quantised: bool


class View:
    """An index over one graph."""

    def __init__(self, model: Model) -> None:
        self.model, self.graph = model, model.graph

    @cached_property
    def makers(self) -> dict[str, Node]:
        """Tensor to the node that makes it."""
        return {name: node for node in self.graph.nodes for name in node.outputs if name}

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """Name to stored tensor, those of Constant nodes included."""
        found = {tensor.name: tensor for tensor in self.graph.initializers}
        for node in self.graph.nodes:
            if node.op_type == "Constant" and isinstance(value := node.attributes.get("value"), Tensor):
                found[node.outputs[0]] = value
        return found

    def constant(self, name: str) -> Array | None:
        """The values of a constant tensor, also of a Constant that holds plain numbers; None where it is computed."""
        if name in self.constants:
            return self.constants[name].array
        maker = self.makers.get(name)
        if maker is not None and maker.op_type == "Constant":
            value = next((v for k, v in maker.attributes.items() if k.startswith("value_")), None)
            return None if value is None else np.asarray(value)
        return None

    def stored_weight(self, name: str) -> tuple[Tensor | None, list[Node]]:
        """The constant behind an operand, through Q, DQ and moves, and the nodes on the way."""
        way: list[Node] = []
        for _ in range(MAX_STEPS):
            if name in self.constants:
                return self.constants[name], way
            maker = self.makers.get(name)
            if maker is None or maker.op_type not in MOVES | {Q, DQ} or not maker.inputs:
                break
            way.append(maker)
            name = maker.inputs[0]
        return None, way

    def products(self) -> list[Product]:
        """All convolutions and matrix products."""
        return [Product(node, all(self._from_grid(name) for name in node.inputs[:2]))
                for node in self.graph.nodes if node.op_type in PRODUCTS]

    def _from_grid(self, name: str) -> bool:
        for _ in range(MAX_STEPS):
            maker = self.makers.get(name)
            if maker is None:
                return False
            if maker.op_type == DQ:
                return True
            if maker.op_type not in MOVES or not maker.inputs:
                return False
            name = maker.inputs[0]
        return False

    def count(self, op_type: str) -> int:
        """Number of nodes of one type."""
        return sum(node.op_type == op_type for node in self.graph.nodes)


def tensors_of(graph: Graph) -> list[Tensor]:
    """Every stored tensor, also those in attributes."""
    return [*graph.initializers, *(tensor for node in graph.nodes for tensor in node.tensors)]


def refuse(node: Node, what: str, *, fix: str, expected: object = None, found: object = None) -> ModelFileError:
    """An error that names a node."""
    return ModelFileError(what, where=node.where, expected=expected, found=found, fix=fix)

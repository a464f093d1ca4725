"""A small language for ONNX graphs: one call a layer, shapes followed along."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 20, 10


class Sketch:
    """An ONNX graph under construction. Tensors are names; `shape` knows their sizes.

    Args:
        name: of the graph.
        shape: of the one input, batch first.
        seed: None writes weights as ConstantOfShape, which keeps the file small (such a file is for counting);
            a number draws them, scaled so that activations keep their size, for files that are run.
    """

    def __init__(self, name: str, shape: tuple[int, ...], seed: int | None = None) -> None:
        self.name, self.nodes, self.weights = name, [], []  # type: str, list[Any], list[Any]
        self.random = None if seed is None else np.random.default_rng(seed)
        self.sizes: dict[str, tuple[int, ...]] = {"input": shape}
        self.parameters = 0

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Sizes of a tensor, batch first."""
        return self.sizes[tensor]

    def node(self, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> str:
        """Add one node with one output of `shape`; returns the output."""
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        self.sizes[name] = shape
        return name

    def weight(self, shape: tuple[int, ...], fan_in: int = 1) -> str:
        """A float parameter."""
        self.parameters += prod(shape)
        if self.random is None:
            return self.node("ConstantOfShape", [self.integers(shape)], shape,
                             value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0.02]))
        values = self.random.standard_normal(shape, dtype=np.float32) * np.float32(1.4 / fan_in**0.5)
        return self._initializer(values, "w")

    def integers(self, values: tuple[int, ...]) -> str:
        """A constant of INT64."""
        return self._initializer(np.asarray(values, np.int64), "i")

    def scalar(self, value: float) -> str:
        """A float constant."""
        return self._initializer(np.asarray(value, np.float32), "s")

    def _initializer(self, values: Any, letter: str) -> str:
        name = f"{letter}{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values, name))
        self.sizes[name] = values.shape
        return name

    def conv(self, x: str, out: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, act: str = "",
             pad: int | None = None) -> str:
        """A convolution with bias (batch normalisation is folded), and its activation."""
        batch, channels, height, width = self.shape(x)
        pad = kernel // 2 if pad is None else pad
        size = [(side + 2 * pad - kernel) // stride + 1 for side in (height, width)]
        fan_in = channels // groups * kernel * kernel
        weight = self.weight((out, channels // groups, kernel, kernel), fan_in)
        y = self.node("Conv", [x, weight, self.weight((out,), fan_in)], (batch, out, *size), pads=[pad] * 4,
                      strides=[stride] * 2, kernel_shape=[kernel] * 2, group=groups)
        return self.act(y, act)

    def deconv(self, x: str, out: int, factor: int, *, act: str = "") -> str:
        """A transposed convolution whose kernel equals its stride."""
        batch, channels, height, width = self.shape(x)
        weight = self.weight((channels, out, factor, factor), channels)
        y = self.node("ConvTranspose", [x, weight, self.weight((out,), channels)],
                      (batch, out, height * factor, width * factor), strides=[factor] * 2, kernel_shape=[factor] * 2)
        return self.act(y, act)

    def act(self, x: str, kind: str) -> str:
        """An activation: "relu", "relu6", "gelu", "silu" (which ONNX spells Sigmoid and Mul), "sigmoid" or none."""
        if kind == "silu":
            return self.node("Mul", [x, self.node("Sigmoid", [x], self.shape(x))], self.shape(x))
        if kind == "relu6":
            return self.node("Clip", [x, self.scalar(0.0), self.scalar(6.0)], self.shape(x))
        ops = {"relu": "Relu", "gelu": "Gelu", "sigmoid": "Sigmoid"}
        return self.node(ops[kind], [x], self.shape(x)) if kind else x

    def linear(self, x: str, out: int, *, act: str = "") -> str:
        """A product with a matrix over the last axis, plus a bias."""
        inner = self.shape(x)[-1]
        shape = (*self.shape(x)[:-1], out)
        y = self.node("MatMul", [x, self.weight((inner, out), inner)], shape)
        return self.act(self.node("Add", [y, self.weight((out,), inner)], shape), act)

    def norm(self, x: str) -> str:
        """LayerNormalization over the last axis."""
        size = (self.shape(x)[-1],)
        return self.node("LayerNormalization", [x, self.weight(size), self.weight(size)], self.shape(x), axis=-1)

    def matmul(self, a: str, b: str) -> str:
        """A product of two activations."""
        return self.node("MatMul", [a, b], (*self.shape(a)[:-1], self.shape(b)[-1]))

    def softmax(self, x: str, axis: int = -1) -> str:
        """Softmax over one axis."""
        return self.node("Softmax", [x], self.shape(x), axis=axis)

    def add(self, a: str, b: str, *, act: str = "") -> str:
        """A sum, and its activation."""
        return self.act(self.node("Add", [a, b], self.shape(a)), act)

    def scale(self, x: str, factor: float) -> str:
        """A product with a constant."""
        return self.node("Mul", [x, self.scalar(factor)], self.shape(x))

    def concat(self, parts: list[str], axis: int = 1) -> str:
        """Concatenation."""
        shape = list(self.shape(parts[0]))
        shape[axis] = sum(self.shape(part)[axis] for part in parts)
        return self.node("Concat", parts, tuple(shape), axis=axis)

    def part(self, x: str, begin: int, end: int, axis: int = 1) -> str:
        """A slice along one axis."""
        shape = list(self.shape(x))
        shape[axis] = end - begin
        ends = [self.integers((value,)) for value in (begin, end, axis)]
        return self.node("Slice", [x, *ends], tuple(shape))

    def max_pool(self, x: str, kernel: int, stride: int = 1, *, pad: int | None = None) -> str:
        """Max pooling; padding is kernel // 2 where none is given."""
        batch, channels, height, width = self.shape(x)
        pad = kernel // 2 if pad is None else pad
        size = [(side + 2 * pad - kernel) // stride + 1 for side in (height, width)]
        return self.node("MaxPool", [x], (batch, channels, *size), kernel_shape=[kernel] * 2, strides=[stride] * 2,
                         pads=[pad] * 4)

    def global_pool(self, x: str) -> str:
        """Mean over height and width, flattened."""
        batch, channels = self.shape(x)[:2]
        return self.reshape(self.node("GlobalAveragePool", [x], (batch, channels, 1, 1)), (batch, channels))

    def resize(self, x: str, factor: int = 2) -> str:
        """Nearest-neighbour upsampling."""
        batch, channels, height, width = self.shape(x)
        scales = self._initializer(np.asarray([1, 1, factor, factor], np.float32), "r")
        return self.node("Resize", [x, "", scales], (batch, channels, height * factor, width * factor), mode="nearest")

    def reshape(self, x: str, shape: tuple[int, ...]) -> str:
        """The same elements in another shape."""
        return self.node("Reshape", [x, self.integers(shape)], shape)

    def transpose(self, x: str, order: tuple[int, ...]) -> str:
        """Axes in another order."""
        return self.node("Transpose", [x], tuple(self.shape(x)[axis] for axis in order), perm=list(order))

    def attention(self, x: str, heads: int) -> str:
        """Multi-head self-attention over (B, N, C) with one projection for query, key and value (arXiv:1706.03762)."""
        batch, tokens, width = self.shape(x)
        one = width // heads
        parts = self.transpose(self.reshape(self.linear(x, 3 * width), (batch, tokens, 3, heads, one)), (2, 0, 3, 1, 4))
        q, k, v = (self.reshape(self.part(parts, i, i + 1, 0), (batch, heads, tokens, one)) for i in range(3))
        scores = self.matmul(self.scale(q, one**-0.5), self.transpose(k, (0, 1, 3, 2)))
        mixed = self.transpose(self.matmul(self.softmax(scores), v), (0, 2, 1, 3))
        return self.linear(self.reshape(mixed, (batch, tokens, width)), width)

    def model(self) -> ModelProto:
        """The finished ONNX model; its outputs are the tensors that no node reads."""
        read = {name for node in self.nodes for name in node.input}
        outputs = [name for node in self.nodes for name in node.output if name not in read]
        graph = helper.make_graph(
            self.nodes, self.name, [self._info("input")], [self._info(name) for name in outputs], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    def _info(self, name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, self.shape(name))

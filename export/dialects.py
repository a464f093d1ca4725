"""One grid of numbers, two spellings: the TensorRT dialect and the one that ONNX Runtime's CPU kernels fuse.

TensorRT wants signed activations with zero point 0. ONNX Runtime on x86 multiplies unsigned activations with
signed weights (U8S8): the same file that is right for TensorRT runs slower than float there. `cpu_dialect` moves
each activation's zero point, and nothing else:

- tensors that can be negative: uint8 with zero point 128. q + 128 for q in [-128, 127] is the same grid: exact.
- tensors that cannot (behind a ReLU): uint8 with zero point 0 and the same scale. Equal up to 127 * scale, where the
  signed grid clips and this one goes on to 255. ONNX Runtime drops the ReLU only with this spelling.

On arm64 the kernels are signed (S8S8): the same two cases are spelled int8 with zero point 0 and -128.
Weights become int8 initialisers behind a DequantizeLinear, since ONNX Runtime fuses no weight that it must quantise. A
constant that an Add or Mul reads is spelled like an activation: those kernels want both operands of one type. The bias
of a Gemm becomes INT32, that of a MatMul gets leading axes of 1; see `_spell_biases`.
`spell_for_cpu` chooses by machine, see `isa.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper

from fmdeploy.errors import ModelFileError
from fmdeploy.export.isa import CpuKind, narrow_weights, saturating_layers
from fmdeploy.onnxfile.graph import DQ, Array, Graph, Q, along, attribute

NON_NEGATIVE = {"Relu", "Sigmoid", "Softmax", "Abs", "Exp", "HardSigmoid", "Softplus"}
KEEPS_SIGN = {
    "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax", "Resize",
    "DepthToSpace", "SpaceToDepth", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split",
    "Concat", "Add", "Identity", Q, DQ,
}


LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Transpose", "Reshape", "Gather")  # take signed weights


@dataclass(frozen=True)
class CpuSpelling:
    """A model for ONNX Runtime, and what its machine makes of it."""

    model: ModelProto
    saturating: tuple[str, ...]
    """Layers that would saturate on x86 without VNNI."""
    narrowed: tuple[str, ...]
    """Layers whose weights have 7 bits."""


def spell_for_cpu(model: ModelProto, cpu: CpuKind, *, non_negative: Collection[str] = ()) -> CpuSpelling:
    """Spell a model in the TensorRT dialect for the kernels of `cpu`; arguments and errors as `cpu_dialect`."""
    graph = _spell_pairs(model, signed=cpu == "arm64", non_negative=non_negative)
    narrowed = narrow_weights(graph.model) if cpu == "x86-64-avx2" else ()
    spelled = _finish(graph)  # an integer bias has the scale of its weights: those come first
    return CpuSpelling(spelled, saturating_layers(spelled), narrowed)


def cpu_dialect(model: ModelProto, *, signed: bool = False, non_negative: Collection[str] = ()) -> ModelProto:
    """Return the CPU spelling of a model in the TensorRT dialect.

    Args:
        model: Q/DQ pairs with zero point 0 throughout, float biases; not changed.
        signed: spell activations int8, for arm64; otherwise uint8, for x86-64.
        non_negative: names of model inputs that are never below 0.

    Raises:
        ModelFileError: the model is in another dialect.
    """
    return _finish(_spell_pairs(model, signed=signed, non_negative=non_negative))


def _spell_pairs(model: ModelProto, *, signed: bool, non_negative: Collection[str]) -> Graph:
    """A copy with moved zero points and stored weights."""
    copied = ModelProto()
    copied.CopyFrom(model)
    graph = Graph(copied)
    require_symmetric(graph)
    for node in graph.nodes(Q):
        if node.input[0] in graph.constants:
            _fold_weight(graph, node, signed=signed)
        else:
            _move_zero_point(graph, node, signed=signed, non_negative=non_negative)
    graph.remove([node for node in graph.nodes(Q) if node.input[0] in graph.constants])
    _fold_transposes(graph)
    return graph


def _finish(graph: Graph) -> ModelProto:
    """Spell the biases for the scales that the weights have now, and tidy up."""
    graph.refresh()
    _spell_biases(graph)
    graph.drop_unused()
    return graph.model


def require_symmetric(graph: Graph) -> None:
    """Check that every zero point is a signed 0.

    Raises:
        ModelFileError: one is not: TensorRT would refuse this file.
    """
    for node in graph.nodes(Q, DQ):
        zero = graph.constants.get(node.input[2]) if len(node.input) > 2 else None
        if zero is None or zero.dtype != np.int8 or np.any(zero != 0):
            raise ModelFileError("is not in the TensorRT dialect", where=node.name, expected="int8 zero point 0",
                                 found="none" if zero is None else f"{zero.dtype} {zero.ravel()[:3]}")


def is_non_negative(graph: Graph, tensor: str, known: Collection[str]) -> bool:
    """Whether the values of `tensor` can be proven not to be below 0, `known` being those of which it is known."""
    todo, seen = [tensor], set(known)
    while todo:  # each tensor once: sums of sums would be walked 2^n times
        name = todo.pop()
        if name not in seen:
            operands = _operands_of_sign(graph, name)
            if operands is None:
                return False
            seen.add(name)
            todo += operands
    return True


def _operands_of_sign(graph: Graph, tensor: str) -> list[str] | None:
    """The tensors that must not be below 0 for `tensor` not to be: none where it never is, None where it may be."""
    node = graph.maker.get(tensor)
    if node is None:
        constant = graph.constants.get(tensor)
        return [] if constant is not None and bool(np.all(constant >= 0)) else None
    if node.op_type in NON_NEGATIVE:
        return []
    if node.op_type == "Clip":
        low = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
        return [] if low is not None and float(low) >= 0 else None
    if node.op_type not in KEEPS_SIGN or (node.op_type == "Resize" and attribute(node, "mode") == b"cubic"):
        return None
    return list(node.input) if node.op_type in ("Concat", "Add") else list(node.input[:1])


def _move_zero_point(graph: Graph, node: NodeProto, *, signed: bool, non_negative: Collection[str]) -> None:
    lowest = is_non_negative(graph, node.input[0], non_negative)
    value = (0 if lowest else 128) - (128 if signed else 0)
    zero = np.array(value, np.int8 if signed else np.uint8)
    name = graph.set_constant(f"zero_point_{zero.dtype}_{'relu' if lowest else 'middle'}", zero)
    node.input[2] = name
    for reader in graph.readers[node.output[0]]:
        if reader.op_type != DQ:
            raise ModelFileError("a quantised tensor is read by another operation", where=node.name, expected=DQ,
                                 found=reader.op_type)
        reader.input[2] = name


def quantised_weight(graph: Graph, node: NodeProto) -> Array:
    """Return the int8 values that a QuantizeLinear `node` gives for its constant input (ONNX: round half to even)."""
    weight, scale = graph.constants[node.input[0]], graph.constants[node.input[1]]
    scale = along(scale, weight.ndim, attribute(node, "axis", 1))
    levels: Array = np.clip(np.rint(weight / scale), -128, 127).astype(np.int8)
    return levels


def _fold_weight(graph: Graph, node: NodeProto, *, signed: bool) -> None:
    levels = quantised_weight(graph, node)
    readers = [reader for reader in graph.readers[node.output[0]] if reader.op_type == DQ]
    layers = {other.op_type for reader in readers for other in graph.readers[reader.output[0]]}
    if not signed and not layers & set(LAYERS) and not graph.constants[node.input[1]].ndim:
        levels = (levels.astype(np.int16) + 128).astype(np.uint8)
        for reader in readers:
            reader.input[2] = graph.set_constant("zero_point_uint8_middle", np.array(128, np.uint8))
    graph.redirect(node.output[0], graph.set_constant(f"{node.input[0]}_{levels.dtype}", levels))


def _fold_transposes(graph: Graph) -> None:
    """Store weights the way MatMul reads them, where the export left a Transpose behind their DequantizeLinear."""
    gone = []
    for node in graph.nodes("Transpose"):
        dequantize = graph.maker.get(node.input[0])
        if dequantize is None or dequantize.op_type != DQ or dequantize.input[0] not in graph.constants:
            continue
        if len(graph.readers[dequantize.output[0]]) > 1:
            continue
        order = list(attribute(node, "perm"))
        weight = graph.constants[dequantize.input[0]].transpose(order)
        dequantize.input[0] = graph.set_constant(f"{dequantize.input[0]}_t", weight)
        axis = order.index(attribute(dequantize, "axis", 1))
        del dequantize.attribute[:]
        dequantize.attribute.append(helper.make_attribute("axis", axis))
        graph.redirect(node.output[0], dequantize.output[0])
        gone.append(node)
    graph.remove(gone)


def _spell_biases(graph: Graph) -> None:
    """Spell the biases of linear layers so that ONNX Runtime multiplies in integers even where the result stays float.

    A Gemm is integer only if all of its operands are: its bias becomes INT32 with the scale of the accumulator, as the
    runtime itself would write it. A MatMul with a bias behind it would be merged into a Gemm with a float bias, and run
    in float: a bias of shape (1, 1, N) cannot be merged. ViT-S with Linear-only INT8, one thread: 202 ms become 50.
    """
    for node in graph.nodes("Gemm"):
        _integer_bias(graph, node)
    ranks = _ranks(graph)
    for node in graph.nodes("MatMul"):
        readers = graph.readers[node.output[0]]
        if not _is_integer(graph, node) or len(readers) != 1 or ranks.get(node.output[0], 0) < 3:
            continue
        add = readers[0]
        if add.op_type == "Add" and not any(reader.op_type == Q for reader in graph.readers[add.output[0]]):
            for index, name in enumerate(add.input):
                if name in graph.constants and graph.constants[name].ndim == 1:
                    bias = graph.constants[name]
                    add.input[index] = graph.set_constant(f"{name}_wide", bias.reshape(1, 1, -1))


def _ranks(graph: Graph) -> dict[str, int]:
    known = onnx.shape_inference.infer_shapes(graph.model).graph
    return {value.name: len(value.type.tensor_type.shape.dim) for value in (*known.value_info, *known.output)}


def _is_integer(graph: Graph, node: NodeProto) -> bool:
    """Whether both factors come in 8 bits."""
    makers = [graph.maker.get(name) for name in node.input[:2]]
    return all(maker is not None and maker.op_type == DQ for maker in makers)


def _integer_bias(graph: Graph, node: NodeProto) -> None:
    plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0 and not attribute(node, "transA", 0)
    bias = graph.constants.get(node.input[2]) if len(node.input) > 2 else None
    if bias is None or bias.ndim != 1 or not plain or not _is_integer(graph, node):
        return
    factors = [graph.constants[graph.maker[name].input[1]].astype(np.float64) for name in node.input[:2]]
    scale = np.asarray(factors[0] * factors[1], np.float32)
    scale = scale.reshape(()) if scale.size == 1 else scale
    levels = np.rint(bias / scale)
    if np.abs(levels).max(initial=0) >= 2**31 or not np.all(scale > np.finfo(np.float32).tiny):
        return
    base = f"{node.name}_bias"
    names = [graph.set_constant(f"{base}_int32", levels.astype(np.int32)), graph.set_constant(f"{base}_scale", scale),
             graph.set_constant(f"{base}_zero", np.zeros(scale.shape, np.int32))]
    dequantize = helper.make_node(DQ, names, [f"{base}_float"], name=f"{base}_dequantize")
    if scale.ndim:
        dequantize.attribute.append(helper.make_attribute("axis", 0))
    node.input[2] = dequantize.output[0]
    place = next(k for k, other in enumerate(graph.model.graph.node) if other.output[0] == node.output[0])
    graph.model.graph.node.insert(place, dequantize)
    graph.refresh()

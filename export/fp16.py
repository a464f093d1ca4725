"""FP32 graphs to FP16 ones, types in the graph: what a strongly typed TensorRT builds without any precision flag.

Inputs and outputs stay FP32, with casts inside. A node named in `keep` stays FP32 with all its tensors; between two
such nodes nothing is cast, so a value that FP16 cannot hold never passes through FP16. (ONNX Runtime's own converter
casts between them, and clips weights silently.) LayerNormalization and Gelu stay one operator: their decomposed forms
overflow.

Of Q/DQ pairs the scales change their type, never their value (`require_exact_scale`), and quantised weights are moved
onto their grid first: round(w / s) is the same integer before and after, so the grid of numbers is one in all files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from fmdeploy.errors import ModelFileError
from fmdeploy.export.dialects import quantised_weight
from fmdeploy.onnxfile.graph import DQ, Array, Graph, Q, along, attribute

HALF, SINGLE = int(TensorProto.FLOAT16), int(TensorProto.FLOAT)
SUFFIX = {HALF: "half", SINGLE: "single"}
FIXED = "tensor(float)"  # formal type of an input that no other type can take the place of
MOVES = ("Transpose", "Reshape")
QDQ_OPSET = 19  # the first in which the scale of a Q/DQ pair may be FP16


def half_precision(model: ModelProto, *, keep: Collection[str] = ()) -> ModelProto:
    """Return the FP16-typed form of an FP32 graph.

    Args:
        model: static shapes, constants as initialisers, opset 19 or later where it has Q/DQ pairs; not changed.
        keep: names of nodes that stay FP32, see `fp16probe.probe`.

    Raises:
        ModelFileError: a scale of a Q/DQ pair is no FP16 number, the opset is too old, or a tensor's type is unknown.
    """
    copied = ModelProto()
    copied.CopyFrom(model)
    graph = Graph(copied)
    if graph.nodes(Q, DQ) and copied.opset_import[0].version < QDQ_OPSET:
        raise ModelFileError("Q/DQ pairs have no FP16 form in this opset", expected=f">= {QDQ_OPSET}",
                             found=copied.opset_import[0].version, fix="Export with --opset 20")
    for node in graph.nodes(Q):
        if node.input[0] in graph.constants:
            _move_onto_grid(graph, node)
    typing = Typing(graph, frozenset(keep))
    _rewrite(graph, typing)
    graph.drop_unused()
    onnx.checker.check_model(copied, full_check=True)
    return copied


class Typing:
    """Which nodes of a graph become FP16."""

    def __init__(self, graph: Graph, keep: frozenset[str]) -> None:
        self.graph = graph
        self.opset = graph.model.opset_import[0].version
        self.floats = float_tensors(graph)
        self.types: dict[str, int] = {}  # node's first output → HALF or SINGLE
        for node in graph.model.graph.node:  # in topological order
            if any(name in self.floats for name in node.output) and node.op_type != DQ:
                self.types[node.output[0]] = SINGLE if node.name in keep or not self.may_be_half(node) else HALF
        for node in reversed(graph.nodes(*MOVES)):  # between a weight's DQ and the product that reads it
            if is_weight(graph, node.input[0]):
                readers = [self.types.get(reader.output[0], HALF) for reader in graph.readers[node.output[0]]]
                self.types[node.output[0]] = SINGLE if SINGLE in readers else HALF
        for node in reversed(graph.nodes(DQ)):  # a DQ gives what its readers want
            wanted = {self.types.get(reader.output[0]) for reader in graph.readers[node.output[0]]}
            self.types[node.output[0]] = HALF if HALF in wanted and node.name not in keep else SINGLE
        for node in graph.model.graph.node:  # Q, comparisons, casts to integers: no float comes out
            self.types.setdefault(node.output[0], SINGLE if node.name in keep else self._of_inputs(node))

    def of(self, node: NodeProto) -> int:
        """HALF or SINGLE."""
        return self.types[node.output[0]]

    def of_tensor(self, name: str) -> int:
        """Type in which a float tensor is made; inputs of the graph are FP32."""
        maker = self.graph.maker.get(name)
        return SINGLE if maker is None else self.of(maker)

    def slots(self, node: NodeProto) -> Iterator[int]:
        """Numbers of the inputs of `node` that are float tensors of the node's own type, by ONNX's schemas.

        The others are fixed: the scales of a Resize are FP32 in any node.
        """
        yield from (index for index, formal in self._float_inputs(node) if formal != FIXED)

    def fixed_slots(self, node: NodeProto) -> Iterator[int]:
        """Numbers of the inputs of `node` that are FP32 whatever the node's type, such as the boxes of an NMS."""
        yield from (index for index, formal in self._float_inputs(node) if formal == FIXED)

    def _float_inputs(self, node: NodeProto) -> Iterator[tuple[int, str]]:
        """Number and formal type of every float input."""
        formals = onnx.defs.get_schema(node.op_type, self.opset, node.domain).inputs
        for index, name in enumerate(node.input):
            if name in self.floats:
                yield index, formals[min(index, len(formals) - 1)].type_str

    def may_be_half(self, node: NodeProto) -> bool:
        """Whether ONNX has an FP16 form of this node, with all the outputs that it has here."""
        if not any(name in self.floats for name in node.input) and node.op_type != "Cast":
            return False
        schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        used = {formal for _, formal in self._float_inputs(node) if formal != FIXED}
        used |= {schema.outputs[min(index, len(schema.outputs) - 1)].type_str
                 for index, name in enumerate(node.output) if name in self.floats}
        return all("tensor(float16)" in allowed.get(name, ()) for name in used)

    def _of_inputs(self, node: NodeProto) -> int:
        """Type of a node without float outputs: FP32 where it reads an FP32 tensor, which a cast would spoil."""
        read = [node.input[index] for index in self.slots(node)]
        if node.op_type == Q and node.input[0] in self.graph.constants:
            readers = self.graph.readers[node.output[0]]
            return self.of(readers[0]) if readers else SINGLE
        made = [self.of_tensor(name) for name in read if name not in self.graph.constants]
        return SINGLE if not made or SINGLE in made else HALF


def is_weight(graph: Graph, tensor: str) -> bool:
    """Whether a tensor is a constant behind a Q/DQ pair."""
    dequantize = graph.maker.get(tensor)
    if dequantize is None or dequantize.op_type != DQ:
        return False
    quantize = graph.maker.get(dequantize.input[0])
    return dequantize.input[0] in graph.constants or (quantize is not None and quantize.input[0] in graph.constants)


def float_tensors(graph: Graph) -> frozenset[str]:
    """Names of all FP32 tensors, initialisers included.

    Raises:
        ModelFileError: shape inference does not reach a tensor.
    """
    kinds = _elem_types(graph.model)
    kinds |= {tensor.name: tensor.data_type for tensor in graph.model.graph.initializer}
    if unknown := [name for node in graph.model.graph.node for name in node.output if name and not kinds.get(name)]:
        raise ModelFileError("the type of a tensor cannot be inferred", where=unknown[0])
    return frozenset(name for name, kind in kinds.items() if kind == SINGLE)


def _rewrite(graph: Graph, typing: Typing) -> None:
    """Give every node its type: constants in its own, casts where a tensor is made in the other one."""
    made: dict[tuple[str, int], str] = {}
    scales = {node.output[0]: node.input[1] for node in graph.nodes(DQ) if node.input[1] in graph.constants}
    nodes: list[NodeProto] = []
    for node in graph.model.graph.node:
        kind = typing.of(node)
        for index in list(typing.slots(node)):
            name = node.input[index]
            if name in graph.constants:
                node.input[index] = _constant(graph, name, kind, scale=node.op_type in (Q, DQ) and index == 1)
            elif typing.of_tensor(name) != kind:
                again = name in scales and kind == SINGLE
                node.input[index] = (_dequantize_again(nodes, made, graph.maker[name], scales[name]) if again
                                     else _cast(nodes, made, name, kind))
        for index in typing.fixed_slots(node):
            if typing.of_tensor(node.input[index]) == HALF:
                node.input[index] = _cast(nodes, made, node.input[index], SINGLE)
        if kind == HALF:
            _retarget(node, SINGLE, HALF)
        nodes.append(node)
    nodes += list(_give_outputs(nodes, graph.outputs, typing))
    del graph.model.graph.node[:]
    graph.model.graph.node.extend(nodes)


def _retarget(node: NodeProto, old: int, new: int) -> None:
    """Make a Cast to one type a Cast to another."""
    for item in node.attribute:
        if node.op_type == "Cast" and item.name == "to" and item.i == old:
            item.i = new


def _cast(nodes: list[NodeProto], made: dict[tuple[str, int], str], name: str, kind: int) -> str:
    if (name, kind) not in made:
        made[name, kind] = f"{name}_{SUFFIX[kind]}"
        nodes.append(helper.make_node("Cast", [name], [made[name, kind]], f"{name}_to_{SUFFIX[kind]}", to=kind))
    return made[name, kind]


def _dequantize_again(
    nodes: list[NodeProto], made: dict[tuple[str, int], str], dequantize: NodeProto, scale: str
) -> str:
    """Give FP32 readers a DequantizeLinear of their own: behind a cast TensorRT would run them in float."""
    name = dequantize.output[0]
    if (name, SINGLE) not in made:
        made[name, SINGLE] = f"{name}_{SUFFIX[SINGLE]}"
        again = helper.make_node(DQ, [dequantize.input[0], scale, *dequantize.input[2:]], [made[name, SINGLE]],
                                 f"{dequantize.name}_{SUFFIX[SINGLE]}")
        again.attribute.extend(dequantize.attribute)
        nodes.append(again)
    return made[name, SINGLE]


def _constant(graph: Graph, name: str, kind: int, *, scale: bool) -> str:
    value = graph.constants[name]
    if kind == SINGLE:
        return name
    if scale:
        require_exact_scale(value, name)
    with np.errstate(over="ignore"):  # the probe keeps nodes whose constants do not fit
        half = value.astype(np.float16)
    return graph.set_constant(f"{name}_half", half) if f"{name}_half" not in graph.constants else f"{name}_half"


def require_exact_scale(scale: Array, where: str) -> None:
    """Check that FP16 holds a scale exactly.

    Raises:
        ModelFileError: it does not; the FP16 file would quantise to another grid than the others.
    """
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.array_equal(half.astype(scale.dtype), scale) or not np.all(half > 0):
        raise ModelFileError("a scale is no FP16 number, so the grid would move", where=where,
                             fix="Quantise it again, or export with --rest fp32")


def _give_outputs(nodes: Sequence[NodeProto], outputs: Sequence[str], typing: Typing) -> Iterator[NodeProto]:
    """Let half-precision nodes write `NAME_before_output`, and cast that to the FP32 output NAME."""
    made_half = [name for name in outputs if name in typing.floats and typing.of_tensor(name) == HALF]
    for name in made_half:
        half = f"{name}_before_output"
        for node in nodes:
            for names in (node.input, node.output):
                for index, found in enumerate(names):
                    if found == name:
                        names[index] = half
        yield helper.make_node("Cast", [half], [name], f"{name}_to_output", to=SINGLE)


def _move_onto_grid(graph: Graph, node: NodeProto) -> None:
    """Replace a constant by its quantised values: then rounding it to FP16 (2^-11) never crosses half a level."""
    levels = quantised_weight(graph, node).astype(np.float32)
    scale = along(graph.constants[node.input[1]], levels.ndim, attribute(node, "axis", 1))
    node.input[0] = graph.set_constant(f"{node.input[0]}_grid", levels * scale)


def rounding_made_explicit(model: ModelProto) -> ModelProto:
    """Spell an FP16-typed graph in FP32 with a round trip through FP16 behind every FP16 tensor.

    This is what the types mean, with products summed in FP32 as tensor cores do. ONNX Runtime on a CPU means
    something else: where it has no FP16 kernel it computes neighbouring nodes in FP32 and drops the casts in between,
    so an overflow stays unseen there. Dequantised values are not rounded: TensorRT multiplies the integers themselves.
    """
    kinds = _elem_types(model)
    copied = ModelProto()
    copied.CopyFrom(model)
    graph = Graph(copied)
    for name, value in list(graph.constants.items()):
        if value.dtype == np.float16:
            graph.set_constant(name, value.astype(np.float32))
    nodes: list[NodeProto] = []
    for node in copied.graph.node:
        _retarget(node, HALF, SINGLE)
        nodes.append(node)
        for index, name in enumerate(node.output):
            if kinds.get(name) == HALF and node.op_type != DQ:
                node.output[index] = f"{name}_exact"
                nodes.append(helper.make_node("Cast", [f"{name}_exact"], [f"{name}_rounded"], f"{name}_round", to=HALF))
                nodes.append(helper.make_node("Cast", [f"{name}_rounded"], [name], f"{name}_back", to=SINGLE))
    del copied.graph.node[:]
    copied.graph.node.extend(nodes)
    del copied.graph.value_info[:]
    return copied


def _elem_types(model: ModelProto) -> dict[str, int]:
    known = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {v.name: v.type.tensor_type.elem_type for v in (*known.value_info, *known.input, *known.output)}

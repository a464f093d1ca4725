"""Which nodes of a graph become one kernel.

The rules of TensorRT are read from the layer tables that its compilers print, and checked by the fit: with SiLU in a
kernel of its own the published latencies of YOLO models agree with those of ResNets (all left-out points within 35 %
instead of 78 %), although the newest compiler (TensorRT-RTX 1.7) does fuse it.

    a convolution takes over its bias, folded normalisation, ReLU or clip, and the residual sum behind it;
    a product takes over its bias, any activation and the residual sum behind it;
    pointwise operators and reductions over the last axes run together, as in residual sum + LayerNormalization;
    product, softmax, product over activations is one attention kernel;
    a concatenation is free for parts that a kernel can write in place; slices are copied once; reshapes are free;
    a transpose is free beside a kernel that reads or writes in any order.

ONNX Runtime on a CPU fuses less: `ORT` says what.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

from onnx import NodeProto

from fmdeploy.estimate.operators import POINTWISE, kind_of
from fmdeploy.estimate.shapes import Shape
from fmdeploy.onnxfile.graph import DQ, Graph, Q

PRODUCTS = ("conv", "depthwise", "gemm", "matmul")
MEMORY = ("pointwise", "norm", "softmax", "copy")  # kernels that the compiler generates, and can extend
SIMPLE = frozenset({"Add", "BatchNormalization", "Clip", "Div", "LeakyRelu", "Mul", "PRelu", "Relu", "Sub"})


@dataclass(frozen=True)
class Rules:
    """What a runtime fuses.

    Attributes:
        after_conv: pointwise operators that a convolution takes over.
        after_product: those that a matrix product takes over.
        generated: pointwise operators and reductions are compiled together into kernels.
        attention: product, softmax, product is one kernel.
        in_place: concatenations and transposes cost nothing where a kernel can write to where they lead.
        pads_input: a first convolution of few channels has its input copied and padded.
    """

    after_conv: frozenset[str]
    after_product: frozenset[str]
    generated: bool
    attention: bool
    in_place: bool
    pads_input: bool


TENSORRT = Rules(SIMPLE, frozenset(POINTWISE), generated=True, attention=True, in_place=True, pads_input=True)
ORT = Rules(SIMPLE, frozenset({"Add"}), generated=False, attention=False, in_place=False, pads_input=False)
ORT_INT8 = replace(ORT, after_conv=frozenset({"BatchNormalization", "Clip", "Relu"}))  # INT8 sums are their own nodes


@dataclass
class Group:
    """Nodes that run as one kernel."""

    kind: str
    nodes: list[NodeProto]
    index: int
    before: set[int] = field(default_factory=set)  # groups that must have run

    @property
    def anchor(self) -> NodeProto:
        """The node that names it."""
        return self.nodes[0]


class Fusion:
    """Groups of a graph.

    Attributes:
        groups: in the order of their first nodes.
        maker: tensor → the group that writes it, through views and elided copies.
    """

    def __init__(self, graph: Graph, sizes: dict[str, Shape], weights: set[str], rules: Rules = TENSORRT) -> None:
        self.graph, self.sizes, self.weights, self.rules = graph, sizes, weights, rules
        self.groups: list[Group] = []
        self.maker: dict[str, Group] = {}
        self.root: dict[str, str] = {}  # tensor → the tensor of which it is a view
        self.joined: dict[str, list[str]] = {}  # concatenation that costs nothing → its parts
        self.copied: dict[str, list[str]] = {}  # concatenation → the parts that have to be copied into it
        self.in_place: set[str] = set()  # tensors that lie inside a concatenation already
        for node in graph.model.graph.node:
            if not set(node.output) & weights:
                self._place(node)
        if rules.attention:
            self._fuse_attention()
        self.groups = [group for group in self.groups if group.nodes]

    def source(self, tensor: str) -> str:
        """The tensor that `tensor` is a view of."""
        while tensor in self.root:
            tensor = self.root[tensor]
        return tensor

    def activations(self, node: NodeProto) -> list[str]:
        """Inputs of a node that are not weights."""
        return [name for name in node.input if name and name not in self.weights]

    def readers(self, tensor: str) -> list[NodeProto]:
        """Nodes that read `tensor` or a view of it; views and elided copies are left out."""
        found: list[NodeProto] = []
        for node in self.graph.readers[tensor]:
            if self.is_view(node):
                found += [reader for name in node.output for reader in self.readers(name)]
            else:
                found.append(node)
        return found

    def is_view(self, node: NodeProto) -> bool:
        """Whether a node costs nothing."""
        return (kind_of(node, self.sizes, self.weights) == "view" or node.output[0] in self.root
                or node.output[0] in self.joined)

    def _place(self, node: NodeProto) -> None:
        kind = kind_of(node, self.sizes, self.weights)
        if node.op_type == "Concat":
            self._concatenate(node)
        elif self._crosses_border(node):
            self._join(node, self._new("copy", node))
        elif kind == "view" or (kind == "copy" and self._is_free(node)):
            self._view(node)
        elif kind == "pointwise" and (group := self._epilogue(node)) is not None:
            self._join(node, group)
        elif kind in ("norm", "softmax") and (group := self._memory_producer(node)) is not None:
            self._join(node, group)
            group.kind = kind if group.kind in ("pointwise", "copy") else group.kind
        else:
            self._join(node, self._new(kind, node))

    def _crosses_border(self, node: NodeProto) -> bool:
        """A runtime that writes no other type than it reads converts inputs and outputs in nodes of their own."""
        inward = node.op_type == Q and self.source(node.input[0]) in self.graph.inputs
        outward = node.op_type == DQ and node.output[0] in self.graph.outputs
        return not self.rules.generated and (inward or outward)

    def _concatenate(self, node: NodeProto) -> None:
        """Copy the parts that no kernel can write in place: slices, inputs, and parts of two concatenations."""
        parts, copied = self.activations(node), []
        for index, name in enumerate(parts):
            source = self.source(name)
            sliced = prod(self.sizes[source]) != prod(self.sizes[name])
            made = source in self.maker or source in self.joined
            elided = self.rules.in_place and made and not sliced
            if not elided or source in self.in_place or name in parts[:index]:
                copied.append(name)
            self.in_place.add(source)
        self.copied[node.output[0]] = copied
        if copied:
            self._join(node, self._new("copy", node))
        else:
            self.joined[node.output[0]] = parts

    def _view(self, node: NodeProto) -> None:
        inputs = self.activations(node)
        for name in node.output:
            if inputs:
                self.root[name] = inputs[0]
                if (source := self.source(name)) in self.maker:
                    self.maker[name] = self.maker[source]

    def _new(self, kind: str, node: NodeProto) -> Group:
        group = Group(kind, [], len(self.groups))
        self.groups.append(group)
        return group

    def _join(self, node: NodeProto, group: Group) -> None:
        group.nodes.append(node)
        before = {other for name in self.activations(node) for other in self._needs(name)} - {group.index}
        if new := before - group.before:
            for other in self.groups:
                if other is group or group.index in other.before:
                    other.before |= new
        for name in node.output:
            self.maker[name] = group

    def _needs(self, tensor: str) -> set[int]:
        """Groups that must have run before `tensor` is there; an elided concatenation has several makers."""
        source = self.source(tensor)
        if source in self.joined:
            return {index for part in self.joined[source] for index in self._needs(part)}
        made = self.maker.get(source)
        return set() if made is None else made.before | {made.index}

    def _epilogue(self, node: NodeProto) -> Group | None:
        """The latest group that can take a pointwise node over."""
        size = prod(self.sizes[node.output[0]])
        candidates = {}
        for name in self.activations(node):
            group = self.maker.get(self.source(name))
            fits = group is not None and (prod(self.sizes[name]) == size or group.kind == "norm")  # or a reduced axis
            if group is not None and fits and self._is_open(group, name, node.op_type):
                candidates[group.index] = group
        for index in sorted(candidates, reverse=True):
            if self._is_legal(node, candidates[index]):
                return candidates[index]
        return None

    def _is_open(self, group: Group, tensor: str, op: str) -> bool:
        """Generated kernels are; a product only where nothing but pointwise nodes reads its result."""
        if group.kind in MEMORY:
            return self.rules.generated
        taken = self.rules.after_conv if group.kind in ("conv", "depthwise") else self.rules.after_product
        source = self.source(tensor)
        return group.kind in PRODUCTS and op in taken and source not in self.graph.outputs and all(
            kind_of(reader, self.sizes, self.weights) == "pointwise" for reader in self.readers(source))

    def _is_legal(self, node: NodeProto, group: Group) -> bool:
        """No other input of `node` may wait for `group`: that would be a cycle."""
        waiting = [name for name in self.activations(node) if self.maker.get(self.source(name)) is not group]
        return not any(group.index in self._needs(name) for name in waiting)

    def _memory_producer(self, node: NodeProto) -> Group | None:
        group = self.maker.get(self.source(node.input[0]))
        takes = self.rules.generated and group is not None and group.kind in MEMORY
        return group if takes and group is not None and self._is_legal(node, group) else None

    def _is_free(self, node: NodeProto) -> bool:
        readers = [reader for name in node.output for reader in self.readers(name)]
        if not self.rules.in_place:
            return False
        if node.op_type in ("Slice", "Split"):
            return bool(readers) and all(reader.op_type == "Concat" for reader in readers)
        if node.op_type == "Transpose":
            made = self.maker.get(self.source(node.input[0]))
            kinds = {kind_of(reader, self.sizes, self.weights) for reader in readers}
            absorbed = bool(kinds) and kinds <= {*MEMORY, "matmul"}
            return absorbed or (made is not None and made.kind in (*MEMORY, "gemm", "matmul", "attention"))
        return False

    def _fuse_attention(self) -> None:
        """Merge product → softmax → product where nothing else reads what lies between."""
        for soft in [group for group in self.groups if group.kind == "softmax"]:
            first = self._only_maker(soft)
            last = self._only_reader(soft)
            if first is None or last is None or first.kind != "matmul" or last.kind != "matmul":
                continue
            if self._only_reader(first) is soft:
                last.nodes, last.kind = first.nodes + soft.nodes + last.nodes, "attention"
                for node in last.nodes:
                    for name in node.output:
                        self.maker[name] = last
                first.nodes, soft.nodes = [], []

    def _only_maker(self, group: Group) -> Group | None:
        makers = {id(m): m for node in group.nodes for name in self.activations(node)
                  if (m := self.maker.get(self.source(name))) is not group and m is not None}
        return next(iter(makers.values())) if len(makers) == 1 else None

    def _only_reader(self, group: Group) -> Group | None:
        names = [name for node in group.nodes for name in node.output]
        readers = {id(m): m for name in names for reader in self.readers(name)
                   if (m := self.maker.get(reader.output[0])) is not group and m is not None}
        return next(iter(readers.values())) if len(readers) == 1 else None

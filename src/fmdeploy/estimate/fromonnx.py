"""Work rows of any ONNX file: float, FP16, or with Q/DQ pairs, which disappear into their layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from onnx import ModelProto, NodeProto

from fmdeploy.errors import ModelFileError
from fmdeploy.estimate.fusion import TENSORRT, Fusion, Group, Rules
from fmdeploy.estimate.operators import ALREADY_INT8, TRANSCENDENTAL, WEIGHT_OF, kind_of, product
from fmdeploy.estimate.shapes import Shape, tensor_shapes
from fmdeploy.estimate.work import INT8_KINDS, Work
from fmdeploy.onnxfile.graph import DQ, Graph, Q
from fmdeploy.onnxfile.reading import read_model

NARROW = 8  # fewer input channels than this are padded, by a copy, before the first convolution


@dataclass(frozen=True)
class Workload:
    """What a file asks of a device.

    Attributes:
        rows: one a kernel, in graph order, for one sample.
        batch: samples of the file as it is; 1 where its batch is dynamic.
        dynamic: the file takes any batch.
        quantised: the file has Q/DQ pairs or integer operators, so that it says which layers are INT8.
        unknown: operators that are counted by their memory only, and how many there are.
    """

    rows: tuple[Work, ...]
    batch: int = 1
    dynamic: bool = False
    quantised: bool = False
    unknown: tuple[tuple[str, int], ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-adds of one sample."""
        return sum(row.macs for row in self.rows)


def read_work(path: Path, rules: Rules = TENSORRT) -> Workload:
    """The work of an ONNX file under a runtime's rules of fusion.

    Raises:
        ModelFileError: the file cannot be used, or its sizes cannot be found.
    """
    return work_of(read_model(path), path, rules)


def work_of(model: ModelProto, where: object = "model", rules: Rules = TENSORRT) -> Workload:
    """The work of an ONNX model under a runtime's rules of fusion.

    Raises:
        ModelFileError: an input has a dynamic dimension other than the first, the sizes cannot be found, or nothing in
            the file takes time.
    """
    graph = Graph(model)
    sizes, batch = tensor_shapes(model, where)
    weights = _constants(graph)
    fusion = Fusion(graph, sizes, weights, rules)
    reader = _Reader(graph, sizes, weights, fusion)
    rows = [row for group in fusion.groups for row in reader.rows(group)]
    if not rows:
        raise ModelFileError("computes nothing: it holds views and constants only", where=where)
    unknown = Counter(g.anchor.op_type for g in fusion.groups if g.kind == "other")
    count = batch or 1
    return Workload(tuple(_a_sample(row, count) for row in rows), count, batch is None, reader.quantised,
                    tuple(sorted(unknown.items())))


def _constants(graph: Graph) -> set[str]:
    """Tensors that do not depend on the inputs: weights, and what is computed from them or from shapes alone."""
    constant = set(graph.constants)
    for node in graph.model.graph.node:
        if node.op_type in ("Shape", "Size") or all(name in constant or not name for name in node.input):
            constant |= set(node.output)
    return constant


def _a_sample(row: Work, batch: int) -> Work:
    if batch == 1:
        return row
    small = None if row.int8_activations is None else row.int8_activations // batch
    return replace(row, macs=row.macs // batch, reads=row.reads // batch, writes=row.writes // batch,
                   int8_activations=small)


class _Reader:
    """Turns groups into rows."""

    def __init__(self, graph: Graph, sizes: dict[str, Shape], weights: set[str], fusion: Fusion) -> None:
        self.graph, self.sizes, self.weights, self.fusion = graph, sizes, weights, fusion
        ops = {node.op_type for node in graph.model.graph.node}
        self.quantised = bool(ops & {Q, DQ, *ALREADY_INT8})

    def rows(self, group: Group) -> list[Work]:
        """The kernel of a group; a first convolution of few channels has one more, which pads its input."""
        reads, writes = self._reads(group), self._writes(group)
        products = [node for node in group.nodes if node.op_type in WEIGHT_OF or node.op_type == "Einsum"]
        counts = [product(node, self.sizes) for node in products]
        row = Work(
            name=group.anchor.name or group.anchor.output[0], kind=self._kind(group),
            macs=sum(count[0] for count in counts), weights=self._weights(group),
            reads=sum(reads.values()), writes=sum(writes.values()),
            inner=counts[0][1] if counts else 0, outer=counts[0][2] if counts else 0,
            int8=self._int8(group) if self.quantised else None, int8_activations=self._small(group, reads, writes))
        narrow = [name for name in reads if name in self.graph.inputs and self.sizes[name][1:2] < (NARROW,)]
        if self.fusion.rules.pads_input and group.kind == "conv" and narrow:
            size = reads[narrow[0]]
            return [Work(f"{row.name} input", "copy", reads=size, writes=size, int8=False if self.quantised else None),
                    row]
        return [row]

    def _kind(self, group: Group) -> str:
        """A runtime without generated kernels pays for exponentials."""
        costly = not self.fusion.rules.generated and group.anchor.op_type in TRANSCENDENTAL
        return "transcendental" if costly and group.kind == "pointwise" else group.kind

    def _reads(self, group: Group) -> dict[str, int]:
        """Elements that the kernel reads of every tensor that another one made."""
        reads: dict[str, int] = {}
        for node in group.nodes:
            names = self.fusion.copied.get(node.output[0], self.fusion.activations(node))
            for name in names:
                if self.fusion.maker.get(self.fusion.source(name)) is not group:
                    size = prod(self.sizes[node.output[0]]) if node.op_type in ("Slice", "Gather") else prod(
                        self.sizes[name])
                    source = self.fusion.source(name)
                    reads[source] = max(reads.get(source, 0), size)
        return reads

    def _writes(self, group: Group) -> dict[str, int]:
        """Elements that it writes of every tensor that somebody else reads."""
        writes: dict[str, int] = {}
        for node in group.nodes:
            if node.op_type == "Concat":
                writes[node.output[0]] = sum(prod(self.sizes[name]) for name in self.fusion.copied[node.output[0]])
                continue
            for name in node.output:
                if name and self._is_needed(name, group):
                    writes[name] = prod(self.sizes[name])
        return writes

    def _is_needed(self, tensor: str, group: Group) -> bool:
        readers = self.fusion.readers(tensor)
        outside = any(self.fusion.maker.get(reader.output[0]) is not group for reader in readers)
        return outside or not readers or tensor in self.graph.outputs

    def _weights(self, group: Group) -> int:
        """Matrices, kernels and tables; vectors (bias, scale, folded normalisation) are not counted."""
        names = {name for node in group.nodes for name in node.input if name in self.weights
                 and sum(size > 1 for size in self.sizes[name]) >= 2}
        return sum(prod(self.sizes[name]) for name in names)

    def _int8(self, group: Group) -> bool:
        """Whether Q/DQ pairs or integer operators make this kernel INT8."""
        products = [node for node in group.nodes if kind_of(node, self.sizes, self.weights) in
                    ("conv", "depthwise", "gemm", "matmul")]
        if any(node.op_type in ALREADY_INT8 for node in products):
            return True
        if products:
            return all(self._dequantised(name) for node in products for name in
                       (node.input[0], node.input[WEIGHT_OF.get(node.op_type, 1)]))
        outside = [name for node in group.nodes for name in self.fusion.activations(node)
                   if self.fusion.maker.get(self.fusion.source(name)) is not group]
        return group.kind in INT8_KINDS and bool(outside) and all(self._dequantised(name) for name in outside)

    def _dequantised(self, tensor: str) -> bool:
        """Whether `tensor` comes from a DequantizeLinear, through views; a weight also through its transposition."""
        node = self.graph.maker.get(tensor)
        while node is not None and node.op_type != DQ:
            turned = node.op_type == "Transpose" and node.output[0] in self.weights
            if not turned and not self.fusion.is_view(node):
                return False
            node = self.graph.maker.get(node.input[0])
        return node is not None

    def _small(self, group: Group, reads: dict[str, int], writes: dict[str, int]) -> int:
        """Elements read and written that are INT8 when INT8 is asked for."""
        moved = [*reads.items(), *writes.items()]
        return sum(size for name, size in moved if self._is_small(name))

    def _is_small(self, tensor: str) -> bool:
        if self.quantised:
            readers = self._direct_readers(tensor)
            return bool(readers) and all(node.op_type == Q for node in readers)
        kinds = {group.kind for node in self.fusion.readers(tensor)
                 if (group := self.fusion.maker.get(node.output[0])) is not None}
        return bool(kinds) and kinds <= set(INT8_KINDS)

    def _direct_readers(self, tensor: str) -> list[NodeProto]:
        """Readers, with Q and DQ, behind reshapes and elided copies."""
        found: list[NodeProto] = []
        for node in self.graph.readers[tensor]:
            moved = node.op_type not in (Q, DQ) and self.fusion.is_view(node)
            found += self._direct_readers(node.output[0]) if moved else [node]
        return found

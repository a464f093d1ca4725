"""Which nodes of an FP32 graph cannot be FP16, found by running it on calibration samples.

Every float tensor is looked at, sample by sample, in runs of bounded memory. A node stays FP32 where

- a tensor it reads or writes comes near 65504: within a factor HEADROOM of it, since the road shows larger values than
  calibration did;
- what it sums *inside*, unseen in any tensor, comes near it: the sum behind a mean or a pooling, the squares behind a
  variance or a norm, the exponentials behind a softplus. LayerNormalization sums in FP32 (its `stash_type`);
  Conv, Gemm and MatMul do, too: tensor cores add FP16 products in FP32, only the result is rounded. Softmax subtracts
  the maximum first, so what it adds are numbers up to 1, at most as many as its axis is long;
- rounding a tensor to FP16 loses far more than FP16's 11 bits: numbers so small that they become subnormal or 0;
- a constant it reads overflows, or loses as much, or is a single number that becomes 0 (the epsilon of a
  decomposed normalisation: 0 / 0).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto

from fmdeploy.arrays import Arrays
from fmdeploy.export.fp16 import float_tensors
from fmdeploy.onnxfile.graph import DQ, Array, Graph, Q, attribute
from fmdeploy.onnxfile.session import cpu_session

LARGEST = 65504.0
HEADROOM = 4.0
LIMIT = LARGEST / HEADROOM
FLOOR_DB = 60.0  # rounding to 11 bits gives 73 to 76 dB
CHUNK_BYTES = 64 * 2**20  # of tensors looked at in one run
SAMPLES = range(8, 65)  # evenly spaced calibration samples: at least 8, at most 64,
LOOK_BYTES = 2**32  # and between them as many as show so much
SUMS = ("ReduceMean", "ReduceSum", "GlobalAveragePool", "AveragePool")
SQUARES = ("ReduceL2", "InstanceNormalization", "GroupNormalization")
ADDITIVE = {"Conv": (2,), "ConvTranspose": (2,), "Gemm": (2,), "LayerNormalization": (2,), "Add": (0, 1), "Sub": (0, 1)}


@dataclass
class Seen:
    """What all samples showed of one tensor."""

    largest: float = 0.0
    energy: float = 0.0
    lost: float = 0.0
    abs_sum: float = 0.0
    square_sum: float = 0.0

    @property
    def rounding_db(self) -> float:
        """Energy of the tensor over energy of what rounding to FP16 changes."""
        if not (math.isfinite(self.energy) and math.isfinite(self.lost)):
            return -math.inf
        return 10 * math.log10(self.energy / self.lost) if self.energy and self.lost else math.inf


@dataclass(frozen=True)
class Kept:
    """A node that stays FP32: which tensor or constant decided, why, and the number."""

    node: str
    op: str
    tensor: str
    why: str
    value: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; an overflow to infinity is written as a string."""
        fields = asdict(self)
        return {**fields, "value": self.value if math.isfinite(self.value) else str(self.value)}


def probe(model: ModelProto, inputs: Arrays, *, chunk_bytes: int = CHUNK_BYTES) -> tuple[Kept, ...]:
    """Run an FP32 graph and name the nodes that must stay FP32.

    Args:
        model: static batch-1 graph with named nodes; Q/DQ pairs are run as they stand.
        inputs: calibration inputs by name, (N, ...) float32; a few dozen of them are run.
        chunk_bytes: bound on the tensors that one run returns.

    Returns:
        In graph order, one row a node.
    """
    graph = Graph(model)
    seen = {name: Seen() for name in graph.inputs}
    count = len(next(iter(inputs.values())))
    wanted = np.clip(LOOK_BYTES // max(sum(_bytes_of(model).values()), 1), SAMPLES[0], SAMPLES[-1])
    chosen = np.unique(np.linspace(0, count - 1, min(int(wanted), count)).astype(int))
    feeds = [{name: np.ascontiguousarray(array[k : k + 1]) for name, array in inputs.items()} for k in chosen]
    axes = _inner_axes(graph)
    for feed in feeds:
        for name, array in feed.items():
            _look(seen[name], array, axes.get(name))
    for names in _chunks(graph, chunk_bytes):
        seen |= _watch(model, names, feeds, axes)
    return tuple(_judge(graph, seen))


def _chunks(graph: Graph, chunk_bytes: int) -> Iterator[list[str]]:
    """Names of all computed float tensors, in groups that fit the bound; each group holds at least one."""
    sizes = _bytes_of(graph.model)
    group: list[str] = []
    total = 0
    for node in graph.model.graph.node:
        for name in (n for n in node.output if n in sizes):
            if group and total + sizes[name] > chunk_bytes:
                yield group
                group, total = [], 0
            group.append(name)
            total += sizes[name]
    if group:
        yield group


def _bytes_of(model: ModelProto) -> dict[str, int]:
    floats, inputs = float_tensors(Graph(model)), {value.name for value in model.graph.input}
    return {name: 4 * math.prod(shape) for name, shape in _shapes(model).items() if name in floats - inputs}


def _shapes(model: ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of inputs and computed tensors; an unknown size counts as 1."""
    known = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {value.name: tuple(max(d.dim_value, 1) for d in value.type.tensor_type.shape.dim)
            for value in (*known.input, *known.value_info, *known.output)}


def _watch(
    model: ModelProto, names: list[str], feeds: list[Arrays], axes: Mapping[str, tuple[int, ...]]
) -> dict[str, Seen]:
    watched = ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    session = cpu_session(watched.SerializeToString(), optimise=False)
    seen = {name: Seen() for name in names}
    for feed in feeds:
        for name, array in zip(names, session.run(names, feed), strict=True):
            _look(seen[name], array, axes.get(name))
    return seen


def _look(seen: Seen, array: Array, axes: tuple[int, ...] | None = None) -> None:
    values = array.astype(np.float32, copy=False)
    flat = values.ravel()
    with np.errstate(over="ignore", invalid="ignore"):
        lost = flat.astype(np.float16).astype(np.float32) - flat
        energy = float(flat @ flat)
        largest = float(np.abs(flat).max(initial=0.0))
        seen.largest = max(seen.largest, largest if math.isfinite(largest) else math.inf)  # NaN counts as overflow
        seen.energy += energy
        seen.lost += float(lost @ lost)
        if axes is not None:
            seen.abs_sum = max(seen.abs_sum, float(np.abs(values).sum(axis=axes).max(initial=0.0)))
            seen.square_sum = max(seen.square_sum, float(np.square(values).sum(axis=axes).max(initial=0.0)))


def _inner_axes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Tensor → the axes over which a node that reads it sums; of two such nodes, the more axes."""
    found: dict[str, tuple[int, ...]] = {}
    shapes = _shapes(graph.model)
    for node in graph.nodes(*SUMS, *SQUARES):
        name = node.input[0]
        found[name] = max(found.get(name, ()), _summed_axes(graph, node, len(shapes.get(name, ()))), key=len)
    return found


def _summed_axes(graph: Graph, node: NodeProto, rank: int) -> tuple[int, ...]:
    """Maps are (1, C, ...): all places of a channel, or of a group's channels, which all channels bound."""
    if not node.op_type.startswith("Reduce"):
        return tuple(range(1 if node.op_type == "GroupNormalization" else 2, rank))
    axes = graph.constants.get(node.input[1]) if len(node.input) > 1 else attribute(node, "axes")
    return tuple(range(rank)) if axes is None or not len(axes) else tuple(int(axis) for axis in axes)


def _judge(graph: Graph, seen: Mapping[str, Seen]) -> Iterator[Kept]:
    floats = float_tensors(graph)
    for node in graph.model.graph.node:
        if node.op_type in (Q, DQ):
            continue  # their types follow their neighbours, their scales are exact by construction
        tensors = [n for n in (*node.input, *node.output) if n in floats]
        reasons = [*_about_tensors(graph, tensors, seen), *_about_inside(node, seen),
                   *_about_constants(graph, node, seen)]
        if reasons:
            name, why, value = reasons[0]
            yield Kept(node.name, node.op_type, name, why, value)


def _about_tensors(
    graph: Graph, tensors: list[str], seen: Mapping[str, Seen]
) -> Iterator[tuple[str, str, float]]:
    for name in tensors:
        found = seen.get(name)
        if found is None:
            continue
        if found.largest > LIMIT:
            yield name, f"largest value; {LIMIT:.0f} is allowed", found.largest
        elif found.rounding_db < FLOOR_DB and name not in graph.inputs:
            yield name, f"dB kept by FP16; {FLOOR_DB:g} is the least", round(found.rounding_db, 1)


def _about_inside(node: NodeProto, seen: Mapping[str, Seen]) -> Iterator[tuple[str, str, float]]:
    found = seen.get(node.input[0]) if node.input else None
    if found is None:
        return
    inside = {**dict.fromkeys(SUMS, found.abs_sum), **dict.fromkeys(SQUARES, found.square_sum)}.get(node.op_type, 0.0)
    if node.op_type == "Softplus":
        inside = math.exp(min(found.largest, 700.0))
    if node.op_type == "LayerNormalization" and attribute(node, "stash_type", 1) != onnx.TensorProto.FLOAT:
        inside = found.energy
    if inside > LIMIT:
        yield node.input[0], f"sum inside the node; {LIMIT:.0f} is allowed", inside


def _about_constants(graph: Graph, node: NodeProto, seen: Mapping[str, Seen]) -> Iterator[tuple[str, str, float]]:
    for index, name in enumerate(node.input):
        value = graph.constants.get(name)
        if value is None or value.dtype != np.float32 or not value.size:
            continue
        with np.errstate(over="ignore"):
            half = value.astype(np.float16).astype(np.float64)
        if not np.isfinite(half).all():
            yield name, "constant that FP16 cannot hold", float(np.abs(value).max())
        elif value.size == 1 and value.item() and not half.item():
            yield name, "constant that becomes 0 in FP16", float(value.item())
        else:
            ratio = _kept_db(node, index, value.astype(np.float64), half, seen)
            if ratio < FLOOR_DB:
                yield name, f"dB of the constant kept by FP16; {FLOOR_DB:g} is the least", round(ratio, 1)


def _kept_db(node: NodeProto, index: int, value: Array, half: Array, seen: Mapping[str, Seen]) -> float:
    """What rounding a constant loses: of a bias against the values that it is added to, else against itself."""
    lost = float(np.abs(half - value).max())
    if not lost:
        return math.inf
    if index in ADDITIVE.get(node.op_type, ()):
        result = seen.get(node.output[0])
        return 20 * math.log10(result.largest / lost) if result is not None and result.largest else math.inf
    return 10 * math.log10(float(np.square(value).sum()) / float(np.square(half - value).sum()))

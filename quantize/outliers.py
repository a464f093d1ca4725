"""The outlier probe: which tensors one INT8 scale cannot hold, measured before anything is decided.

One scale a tensor is `max / 127`. Where a few channels are far larger than the rest, or stand at a large constant, as
in the residual streams of transformers (arXiv:2208.07339), the others share the last few steps of the grid. What that
costs is decided by the layer that reads the tensor: it may need the large channels or just those others. So the probe
estimates the SQNR of that layer's result, with channels taken as independent:

    reader_db = 10 log10( sum_k s_k / sum_k w_k mean(e_k²) ),   w_k = squared norm of the weights of channel k

where e is the rounding error under the tensor's scale and s_k = w_k var(x_k) + w_k mean(x_k)². A channel that stands
at a large constant carries no information, so the second term counts no more than CONSTANT times what the median
channel carries. The ratios max/rms and max/p99.9 are reported beside it; they do not tell outliers that matter.

MIN_READER_DB is where the output has begun to suffer: `benchmarks/outliers.py` plants two outlier channels without
changing what the float network computes. With reader_db at 20.2 the outputs of the vision transformer have lost 3.4 dB,
at 14.2 they have lost 10.3, at 2.4 they are noise. In the CNN it is 4.6 dB at 23.8 and 9.6 dB at 17.7. All the while
max/rms stands between 12 and 19 and max/p99.9 at 1.6. Without planted outliers nothing is held: the lowest tensor of
the trained demo student is at 27 dB.
"""

# C channels, P positions of one channel over all probed samples

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from fmdeploy.quantize.flow import Roles, is_norm, is_sum, is_values, readers, sources
from fmdeploy.quantize.ops import CONV_MODULES, TRANSPOSED_MODULES, WEIGHTED_MODULES, Role, module_of
from fmdeploy.quantize.placement import Placement, TensorRow
from fmdeploy.quantize.samples import CalibrationSet

SAMPLES = 16  # evenly spread over the calibration set: outliers of this kind are in every sample
POSITIONS = 32  # values kept of each channel and sample, evenly spread
MIN_READER_DB = 20.0
CONSTANT = 10
STEPS = 127
EXACT_DB = 99.0
SHOWN = 6

Columns = Mapping[str, Sequence[Tensor]]  # tensor → for each layer that reads it, the squared weights of each channel


@dataclass
class Seen:
    """What was seen of one tensor: its largest magnitude, its mean square, and some values of each channel."""

    max: float = 0.0
    squares: float = 0.0
    count: int = 0
    values: list[Tensor] = field(default_factory=list)

    def note(self, tensor: Tensor, axis: int) -> None:
        """Add one sample (1, ...)."""
        self.max = max(self.max, float(tensor.abs().max()))
        self.squares += float(tensor.square().sum(dtype=torch.float64))
        self.count += tensor.numel()
        channels_CP = tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)
        step = max(1, channels_CP.shape[1] // POSITIONS)
        self.values.append(channels_CP[:, ::step][:, :POSITIONS].clone())

    @cached_property
    def kept(self) -> Tensor:
        """All values (C, P); nothing is noted any more after the first look."""
        return torch.cat(self.values, dim=1)

    @cached_property
    def p999(self) -> float:
        """The magnitude that 99.9 % of the kept values do not exceed."""
        magnitudes = self.kept.abs().flatten()
        return float(magnitudes.kthvalue(max(1, math.ceil(0.999 * len(magnitudes)))).values)

    def row(self, name: str, amax: float, columns: Sequence[Tensor]) -> TensorRow:
        """Its statistics, where `amax` is the range of the scale that it gets."""
        channels = len(self.kept)
        fitting = [column for column in columns if len(column) == channels] or [torch.ones(channels)]
        return TensorRow(name, self.max, math.sqrt(self.squares / max(self.count, 1)), self.p999,
                         min(reader_db(self.kept, amax, column_C) for column_C in fitting))


def reader_db(values_CP: Tensor, amax: float, column_C: Tensor) -> float:
    """Estimate the SQNR in dB of a layer that reads a tensor under one symmetric INT8 scale.

    Args:
        values_CP: float32 values of the tensor.
        amax: the largest magnitude that the scale holds.
        column_C: the squared norm of the layer's weights for each channel.
    """
    values, column = values_CP.double(), column_C.double()
    constant_C, moving_C = values.mean(1).square() * column, values.var(1, correction=0) * column
    power_C = (constant_C + moving_C)[constant_C + moving_C > 0]
    if amax <= 0 or not len(power_C):
        return EXACT_DB
    signal = float((moving_C + constant_C.clamp(max=CONSTANT * float(power_C.median()))).sum())
    scale = amax / STEPS
    noise = float(((torch.round(values / scale) * scale - values).square().mean(1) * column).sum())
    return min(10 * math.log10(signal / noise), EXACT_DB) if noise > 0 else EXACT_DB


def columns_of(layer: nn.Module) -> Tensor:
    """Return the squared norm of a conv's or linear's weights for each input channel (C,)."""
    weight = layer.get_parameter("weight").detach()
    if isinstance(layer, TRANSPOSED_MODULES):
        return weight.square().flatten(1).sum(1)
    groups = int(getattr(layer, "groups", 1))
    return weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel()).square().sum((1, 3)).flatten()


def reading_columns(gm: fx.GraphModule, roles: Roles) -> dict[str, list[Tensor]]:
    """For every tensor the layers that read it, directly or behind sums, ReLUs and moves."""
    found: dict[str, list[Tensor]] = {}
    for node in reversed(list(roles)):
        columns: list[Tensor] = []
        for reader in readers(node):
            layer = module_of(gm, reader)
            if isinstance(layer, WEIGHTED_MODULES):
                columns.append(columns_of(layer))
            elif roles[reader] in (Role.RELU, Role.PASS, Role.ADD):
                columns += found.get(reader.name, [])
        found[node.name] = columns
    return found


def probe_graph(
    gm: fx.GraphModule, tensors: Iterable[str], calibration_set: CalibrationSet, names: Sequence[str]
) -> dict[str, Seen]:
    """Run a float graph on some of the samples, one by one, and describe `tensors` and every residual sum.

    Args:
        gm: from `trace.float_graph`.
        tensors: names of nodes.
        calibration_set: at most SAMPLES of it are run.
        names: the inputs of the graph, in the order of its arguments.
    """
    wanted = set(tensors)
    axes = {node: channel_axis(gm, node) for node in gm.graph.nodes
            if is_values(node) and (node.name in wanted or is_sum(node))}
    seen = {node.name: Seen() for node in axes}

    class Probe(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found = super().run_node(n)
            if n in axes:
                seen[n.name].note(found, axes[n])
            return found

    with torch.no_grad():
        for k in spread(len(calibration_set)):
            Probe(gm).run(*calibration_set.tensors(names, slice(k, k + 1)))
    return seen


def probe_modules(
    model: nn.Module, layers: Sequence[str], calibration_set: CalibrationSet, names: Sequence[str]
) -> dict[str, Seen]:
    """The same for the inputs of single modules, where there is no graph."""
    seen = {name: Seen() for name in layers}

    def hook(name: str, axis: int) -> Any:
        return lambda _, args: seen[name].note(args[0], axis)

    handles = [module.register_forward_pre_hook(hook(name, 1 if isinstance(module, CONV_MODULES) else -1))
               for name, module in model.named_modules() if name in seen]
    try:
        with torch.no_grad():
            for k in spread(len(calibration_set)):
                model(*calibration_set.tensors(names, slice(k, k + 1)))
    finally:
        for handle in handles:
            handle.remove()
    return {name: found for name, found in seen.items() if found.count}


def spread(count: int) -> list[int]:
    """At most SAMPLES numbers below `count`, evenly spread."""
    return sorted({k * count // min(count, SAMPLES) for k in range(min(count, SAMPLES))})


def channel_axis(gm: fx.GraphModule, node: fx.Node) -> int:
    """The axis of the channels: 1 beside a convolution, the last one beside a Linear or LayerNorm."""
    for near in (*readers(node), node, *sources(node)):
        if isinstance(module_of(gm, near), CONV_MODULES):
            return 1
        if isinstance(module_of(gm, near), nn.Linear) or is_norm(gm, near):
            return -1
    return 1 if len(node.meta["tensor_meta"].shape) >= 4 else -1


def measured(placement: Placement, seen: Mapping[str, Seen], columns: Columns) -> tuple[TensorRow, ...]:
    """Statistics of every probed tensor under the scale that it shares with others, or its own."""
    amax = {tensor: max(seen[t].max for t in row.tensors if t in seen)
            for row in placement.activations for tensor in row.tensors if tensor in seen}
    return tuple(found.row(name, amax.get(name, found.max), columns.get(name, ())) for name, found in seen.items())


def hold(
    placement: Placement, rows: Iterable[TensorRow], calls: Mapping[str, str], writers: Mapping[str, str]
) -> dict[str, str]:
    """Name → why of every quantised layer and sum that must stay float, because of what it reads or writes.

    A quantised tensor that no INT8 layer reads is there for the layer that writes it: then that one is held.

    Args:
        placement: the decision so far.
        rows: from `measured`.
        calls: node → name of the layer or sum that it is.
        writers: tensor → name of the layer or sum whose kernel writes it.
    """
    bad = {row.tensor: row for row in rows if row.reader_db < MIN_READER_DB}
    quantised = {row.module for row in placement.weights} | set(placement.adds)
    held: dict[str, str] = {}
    for row in placement.activations:
        if worst := min((bad[t] for t in row.tensors if t in bad), key=lambda r: r.reader_db, default=None):
            found = {calls.get(reader) for reader in row.readers} & quantised \
                or {writers.get(tensor) for tensor in row.tensors} & quantised
            held |= {name: f"outliers in {describe(worst)}" for name in found if name is not None}
    return held


def report(rows: Sequence[TensorRow], sums: set[str], held: Mapping[str, str]) -> Iterator[str]:
    """Lines for the person who watches: the residual sums with the largest maxima, then what is held."""
    largest = sorted((row for row in rows if row.tensor in sums), key=lambda row: -row.max)
    if largest:
        yield f"outlier probe: the largest of {len(largest)} sums"
    yield from (f"  {describe(row)}" for row in largest[:SHOWN])
    yield from (f"  {name} stays in float: {why}" for name, why in held.items())


def describe(row: TensorRow) -> str:
    """The tensor and its numbers."""
    ratio = row.max / row.rms if row.rms else 0.0
    tail = row.max / row.p999 if row.p999 else 0.0
    return (f"{row.tensor}: max {row.max:.3g}, max/rms {ratio:.3g}, max/p99.9 {tail:.3g}, "
            f"its reader {row.reader_db:.1f} dB in INT8")

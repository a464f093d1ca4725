"""What the CPU's integer multiply does: without VNNI, x86 adds pairs of U8S8 products in 16 bits and saturates.

`vpmaddubsw` (AVX2, AVX-512 without VNNI) sums two products of an unsigned and a signed byte into a signed 16-bit
number: 255 * 127 * 2 = 64770 does not fit into 32767. A published ResNet-50 falls from 74.8 % to 69.0 % that way.
Behind a ReLU our unsigned activations use zero point 0 and stay at or below 127 inside the calibrated range:
127 * 128 * 2 = 32512 fits. Only a layer that reads a tensor with zero point 128 can saturate there.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto

from fmdeploy.export.graph import DQ, Array, Graph

CPUINFO = Path("/proc/cpuinfo")
INT16_MAX = 32767
LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Isa:
    """A machine and whether 8-bit products are added without saturation on it."""

    machine: str
    exact_int8: bool


def this_cpu(cpuinfo: Path = CPUINFO) -> Isa:
    """Describe this machine; where /proc/cpuinfo does not say, an x86 CPU is taken to saturate."""
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        return Isa(machine, True)
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return Isa(machine, False)
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return Isa(machine, "avx512_vnni" in flags or "avx_vnni" in flags)


def saturating_layers(model: ModelProto) -> tuple[str, ...]:
    """Name the layers of a uint8 dialect that can saturate on x86 without VNNI, at worst, inside calibrated ranges."""
    graph = Graph(model)
    return tuple(node.name for node in graph.nodes(*LAYERS) if _largest_pair(graph, node) > INT16_MAX)


def _largest_pair(graph: Graph, node: NodeProto) -> float:
    """Largest possible |a1 w1 + a2 w2| of one layer; 0 where the layer does not run in U8S8."""
    data, weight = (graph.maker.get(name) for name in node.input[:2])
    if data is None or weight is None or data.op_type != DQ or weight.op_type != DQ:
        return 0.0
    zero = graph.constants[data.input[2]]
    levels = graph.constants.get(weight.input[0])
    if zero.dtype != np.uint8 or levels is None:
        return 0.0
    largest = 127 if int(zero) == 0 else 255
    return float(largest * _two_largest(levels))


def _two_largest(levels: Array) -> int:
    """Sum of the two largest |w| of any output channel. Which two weights meet depends on the packing: the worst."""
    rows = np.abs(levels.reshape(len(levels), -1).astype(np.int32))
    return int(np.sort(rows, axis=1)[:, -2:].sum(axis=1).max())

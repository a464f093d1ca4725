"""Which precision each convolution and matrix product of the ONNX graph got in the engine."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fmdeploy.export.tensorrt.builder import NetworkNode, Problem
from fmdeploy.export.tensorrt.layertable import EngineLayer, UnreadableLogError

# LayerTypes that do the arithmetic of a convolution or matrix product.
COMPUTE = {"correlation", "convolution", "deconv", "deconvolution", "gemm", "gemv", "matmul", "mha", "fmha"}
GENERATED = "kgen"  # kernels that the compiler writes: pointwise chains, and products too small for a kernel
# Names of generated kernels that hold a matrix product with weights or an attention block.
GENERATED_COMPUTE = re.compile(r"gemm|mha|attention|(?:Fc|Corr|Conv|Gemm|Bmm)(?![a-z])")
SMALL = ("INT8", "UINT8", "FP8", "FP4", "INT4")
FOLDED = "FOLDED"


@dataclass(frozen=True)
class NodeVerdict:
    """One convolution or matrix product of the network.

    Attributes:
        node: Name of the ONNX node.
        kind: What the parser made of it, such as CONVOLUTION.
        precision: "INT8", "FP16", "FP32", …: the type of both operands; "MIXED" where only one is of a small type;
            "FOLDED" where no layer holds it: the compiler knew the result.
        layer: Name of the engine layer that computes it.
    """

    node: str
    kind: str
    precision: str
    layer: str | None


def precision_of(layer: EngineLayer) -> str:
    """Type of a layer's arithmetic: a small type counts only where two operands have it.

    A quantised product has two INT8 operands, input and weight or two inputs. One alone is converted first. In a
    generated kernel two INT8 inputs may be those of a pointwise sum: there the weight must be INT8.
    """
    inputs = [t.dtype for t in layer.inputs]
    weights = [t.dtype for t in layer.weights if not t.is_scalar]
    if not is_compute(layer):
        same = [dtype for dtype in weights if dtype in inputs]
        return (same or weights or inputs or ["NONE"])[0]
    count = Counter(inputs + weights)
    for small in SMALL:
        if count[small]:
            return small if count[small] >= 2 else "MIXED"
    return (inputs + weights or ["NONE"])[0]


def is_compute(layer: EngineLayer) -> bool:
    """Whether a layer computes convolutions or matrix products."""
    kind = layer.kind.lower()
    return kind in COMPUTE or (kind == GENERATED and GENERATED_COMPUTE.search(layer.name) is not None)


def verdicts(nodes: Sequence[NetworkNode], layers: Sequence[EngineLayer]) -> tuple[NodeVerdict, ...]:
    """Find the engine layer of every network node.

    A node's name is on its kernel and on pointwise kernels that took over its bias or scale: the former decides. A node
    on generated kernels alone (a product with one row, say) is judged by the first of them.

    Raises:
        UnreadableLogError: a kernel belongs to no node while a node has no kernel: the names do not fit together.
    """
    by_node: dict[str, list[EngineLayer]] = defaultdict(list)
    for layer in layers:
        for name in layer.nodes:
            by_node[name].append(layer)
    found = tuple(_verdict(node, by_node[node.name]) for node in nodes)
    claimed = {verdict.layer for verdict in found}
    orphans = [layer.name for layer in layers if is_compute(layer) and not _is_claimed(layer, claimed, nodes)]
    lost = [verdict.node for verdict in found if verdict.precision == FOLDED]
    if lost and (orphans or not any(is_compute(layer) for layer in layers)):
        raise UnreadableLogError("kernels and ONNX nodes cannot be matched", expected=f"a kernel for {lost[0]}",
                                 found=orphans[0] if orphans else "no kernel at all")
    return found


def _verdict(node: NetworkNode, hits: Sequence[EngineLayer]) -> NodeVerdict:
    best = next((layer for layer in hits if is_compute(layer)), hits[0] if hits else None)
    if best is None:
        return NodeVerdict(node.name, node.kind, FOLDED, None)
    return NodeVerdict(node.name, node.kind, precision_of(best), best.name)


def _is_claimed(layer: EngineLayer, claimed: set[str | None], nodes: Sequence[NetworkNode]) -> bool:
    return layer.name in claimed or any(node.name in layer.nodes for node in nodes)


def unmet(found: Sequence[NodeVerdict], require_int8: Sequence[str]) -> tuple[Problem, ...]:
    """What contradicts the placement: a node that should run in INT8 and does not, or is not in the network."""
    precision = {verdict.node: verdict.precision for verdict in found}
    return tuple(
        Problem("precision", f"runs in {precision[name]}, the placement says INT8" if name in precision
                else "is no convolution or matrix product of the network", node=name)
        for name in require_int8 if precision.get(name) != "INT8"
    )

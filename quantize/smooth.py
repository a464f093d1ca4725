"""SmoothQuant (arXiv:2211.10438): large activation channels hand some of their size over to the weights.

A LayerNorm's result x feeds Linear layers W. With any positive s,  (x / s) · (s W) = x W. Dividing the LayerNorm's
scale and shift by s and multiplying the columns of W costs nothing at run time, and the float network stays what it
was. What changes is how much of the INT8 grid one outlier channel takes.

modelopt has SmoothQuant, too, but puts 1 / s in front of each Linear as a product of its own, which stays in the ONNX
file; the scales here are its scales (a test compares them) where a LayerNorm feeds one Linear.
"""

# B batch, D channels of the LayerNorm's result, C output channels of a Linear

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fmdeploy.errors import ConfigError
from fmdeploy.quantize.observe import fastest_way, run
from fmdeploy.quantize.ops import module_of
from fmdeploy.quantize.ranges import SmoothRow
from fmdeploy.quantize.samples import CalibrationSet

SMALLEST, LARGEST = 1e-4, 1e4  # of a factor, as in modelopt
NOTHING = 2.0**-31  # a channel whose magnitudes are below is left alone


def smooth(
    graph: fx.GraphModule, calibration_set: CalibrationSet, names: Sequence[str], alpha: float = 0.5
) -> tuple[SmoothRow, ...]:
    """Smooth every LayerNorm of a traced float graph that only Linear layers read, in place.

    Args:
        graph: from `trace.float_graph`.
        calibration_set: shows the largest magnitude of each channel.
        names: names of the arguments of `graph`, in order.
        alpha: how much of the difficulty moves into the weights: s = max|x|^alpha / max|W|^(1 - alpha).

    Returns:
        One row a LayerNorm, with what was done or why nothing was.

    Raises:
        ConfigError: `alpha` is not between 0 and 1.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError("cannot share the difficulty", where="smooth", expected="alpha from 0 to 1", found=alpha)
    calls = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")
    owners = Counter(id(part) for module in graph.modules() for part in module.parameters(recurse=False))
    norms = [node for node in graph.graph.nodes if isinstance(module_of(graph, node), nn.LayerNorm)]
    refusals = {node: _refusal(graph, node, calls, owners) for node in norms}
    seen = _channels(graph, [str(node.target) for node in norms if not refusals[node]], calibration_set, names)
    rows = []
    for node in norms:
        readers = tuple(str(user.target) for user in node.users)
        name = str(node.target)
        rows.append(SmoothRow(name, readers, skipped=why) if (why := refusals[node])
                    else _fold(graph, name, readers, *seen[name], alpha))
    return tuple(rows)


def _refusal(graph: fx.GraphModule, node: fx.Node, calls: Counter[str], owners: Counter[int]) -> str:
    """Why this LayerNorm cannot be smoothed; empty where it can.

    Args:
        graph: from `trace.float_graph`.
        node: calls the LayerNorm.
        calls: module → how many nodes call it.
        owners: id of a parameter → how many modules hold it.
    """
    norm: Any = module_of(graph, node)
    readers = [module_of(graph, user) for user in node.users]
    if not norm.elementwise_affine or len(norm.normalized_shape) != 1:
        return "has no scale and shift for each channel"
    if not readers or not all(isinstance(reader, nn.Linear) for reader in readers):
        return "something other than a Linear reads it"
    if max(calls[str(each.target)] for each in (node, *node.users)) > 1:
        return "is called, or read by a layer that is called, more than once"
    if any(owners[id(part)] > 1 for module in (norm, *readers) if module for part in module.parameters()):
        return "shares a parameter with another layer, or is read by one that does"
    return ""


def _channels(
    graph: fx.GraphModule, norms: Sequence[str], calibration_set: CalibrationSet, names: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each LayerNorm the largest magnitude of each channel, and its mean square: (D,) each."""
    seen: dict[str, list[tuple[Tensor, Tensor, int]]] = {name: [] for name in norms}

    def hook(name: str) -> Any:
        def note(_: nn.Module, __: Any, result: Tensor) -> None:
            flat_RD = result.flatten(0, -2)
            seen[name].append((flat_RD.abs().amax(0), flat_RD.double().square().sum(0), len(flat_RD)))

        return note

    way = fastest_way(graph, calibration_set, names)
    handles = [graph.get_submodule(name).register_forward_hook(hook(name)) for name in norms]
    try:
        for _ in run(graph, calibration_set, names, way):
            pass
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, rows in seen.items():
        largest, squares, counts = zip(*rows, strict=True)
        found[name] = torch.stack(largest).amax(0), torch.stack(squares).sum(0) / sum(counts)
    return found


def _fold(
    graph: fx.GraphModule, name: str, readers: tuple[str, ...], high_D: Tensor, squares_D: Tensor, alpha: float
) -> SmoothRow:
    norm, layers = graph.get_submodule(name), [graph.get_submodule(reader) for reader in readers]
    weight_D = torch.stack([layer.get_parameter("weight").detach().abs().amax(0) for layer in layers]).amax(0)
    scale_D = factors(high_D, weight_D, alpha)
    with torch.no_grad():
        for part in ("weight", "bias"):
            if getattr(norm, part) is not None:
                norm.get_parameter(part).div_(scale_D)
        for layer in layers:
            layer.get_parameter("weight").mul_(scale_D)
    return SmoothRow(name, readers, float(scale_D.min()), float(scale_D.max()), _max_over_rms(high_D, squares_D),
                     _max_over_rms(high_D / scale_D, squares_D / scale_D.double() ** 2))


def _max_over_rms(high_D: Tensor, squares_D: Tensor) -> float:
    rms = float(squares_D.mean()) ** 0.5
    return float(high_D.max()) / rms if rms else 0.0


def factors(activation_D: Tensor, weight_D: Tensor, alpha: float) -> Tensor:
    """Return s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) of each input channel (arXiv:2211.10438, equation 4).

    Args:
        activation_D: Largest magnitude of each channel of the activation, (D,).
        weight_D: Largest magnitude of each column over all readers, (D,).
        alpha: From 0 (nothing but the weights count) to 1.

    Returns:
        (D,) from 1e-4 to 1e4; 1 where activation or weights are zero.
    """
    scale_D = activation_D.float().pow(alpha) / weight_D.float().pow(1 - alpha)
    dead_D = (activation_D <= NOTHING) | (weight_D <= NOTHING)
    return torch.where(dead_D, 1.0, scale_D).clamp(SMALLEST, LARGEST)

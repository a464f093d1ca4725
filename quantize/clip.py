"""Weight clipping as in AWQ (arXiv:2306.00978 and its reference code): narrower weight ranges, where they help.

The range of each output channel is shrunk step by step, and the one with the least squared error of the layer's
*result* on calibration inputs wins. Rounding improves with a narrower range, clipping hurts.

modelopt's `awq_clip` does this for Linear layers with block-wise (INT4) weights only: it skips quantizers without
`block_sizes`, which those of INT8 with one scale a channel are. Given one block a row it finds the same (tested).
"""

# S samples, C output channels

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy.evaluate.sqnr import finite_db, power_db
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.grid import STEPS, fp16_amax
from fmdeploy.quantize.observe import fastest_way, run
from fmdeploy.quantize.ranges import ClipRow
from fmdeploy.quantize.samples import CalibrationSet

# Of the calibrated range. modelopt tries steps of 5 %, made for INT4; with 8 bits the gain lies close to 1.
RATIOS = (*(1 - 0.01 * step for step in range(1, 10)), *(1 - 0.05 * step for step in range(2, 11)))
SAMPLES = 16  # that a layer's error is measured on


def clip(
    module: nn.Module, calibration_set: CalibrationSet, names: Sequence[str], *,
    ratios: Sequence[float] = RATIOS, samples: int = SAMPLES,
) -> tuple[ClipRow, ...]:
    """Narrow the weight ranges of a calibrated quantised `module` where that lowers the error, in place.

    Args:
        module: calibrated; its activation ranges stay.
        calibration_set: shows the layers their inputs, in float.
        names: names of the arguments of `module`, in order.
        ratios: ranges to try beside the calibrated one, as shares of it; ties prefer the first.
        samples: how many are used; which ones follows from their ids.

    Returns:
        One row a quantised layer.
    """
    start = modelopt.ranges(module)
    layers = {quantizer.rpartition(".")[0]: quantizer for quantizer in modelopt.weight_ranges(module)}
    chosen = calibration_set.take(calibration_set.scattered()[:samples])
    inputs = _inputs(module, tuple(layers), chosen, names)
    found = []
    for layer, quantizer in layers.items():
        ranges = [start[quantizer], *(fp16_amax(start[quantizer] * ratio) for ratio in ratios)]
        row, amax = _search(layer, module.get_submodule(layer), inputs.pop(layer), ranges)
        modelopt.set_range(module, quantizer, amax)
        found.append(row)
    return tuple(found)


def _inputs(
    module: nn.Module, layers: Sequence[str], samples: CalibrationSet, names: Sequence[str]
) -> dict[str, list[Tensor]]:
    """What each layer reads in the float model, one tensor a call."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def hook(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name].append(args[0].clone())

        return note

    handles = [module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    try:
        with modelopt.bare(module):
            way = fastest_way(module, samples, names)
            for inputs in seen.values():
                inputs.clear()
            for _ in run(module, samples, names, way):
                pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _search(
    name: str, layer: nn.Module, inputs: Sequence[Tensor], ranges: Sequence[Tensor]
) -> tuple[ClipRow, Tensor]:
    """Return what was done, and each channel's range of least error (C, 1, ...), the first of equals."""
    weight = layer.get_parameter("weight").detach()
    signal = float(_energies(layer, weight, inputs).sum())
    best, least_C = ranges[0].clone(), _energies(layer, _rounded(weight, ranges[0]) - weight, inputs)
    before = float(least_C.sum())
    for amax in ranges[1:]:
        error_C = _energies(layer, _rounded(weight, amax) - weight, inputs)
        better_C = error_C < least_C
        least_C = torch.where(better_C, error_C, least_C)
        best = torch.where(better_C.view(best.shape), amax, best)
    share_C = (best / ranges[0]).flatten()
    row = ClipRow(name, int((share_C < 1).sum()), float(share_C.min()),
                  finite_db(power_db(signal, before)), finite_db(power_db(signal, float(least_C.sum()))))
    return row, best


def _rounded(weight: Tensor, amax: Tensor) -> Tensor:
    """The INT8 grid's nearest values; -128 to 127 steps."""
    step = amax / STEPS
    return torch.clamp(torch.round(weight / step), -STEPS - 1, STEPS) * step


def _energies(layer: Any, weight: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Σ y² of each output channel (C,), y being what `layer` makes of the inputs with `weight` and without its bias."""
    total_C = torch.zeros(len(weight), dtype=torch.float64)
    with torch.no_grad():
        for x in inputs:
            if isinstance(layer, nn.Linear):
                total_C += F.linear(x, weight).flatten(0, -2).double().square().sum(0)
            else:
                total_C += layer._conv_forward(x, weight, None).double().square().flatten(2).sum((0, 2))
    return total_C

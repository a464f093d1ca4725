"""How well every quantised layer's result survives: signal over noise, fake-quantised against float, layer by layer."""

# N samples

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fmdeploy.evaluate.sqnr import finite_db, power_db
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.placement import Placement
from fmdeploy.quantize.samples import CalibrationSet

SAMPLES = 32
BATCH = 8


def layer_sqnr(
    module: nn.Module, placement: Placement, calibration_set: CalibrationSet, names: Sequence[str]
) -> dict[str, float]:
    """SQNR in dB of the result of each quantised conv and linear, with everything in front of it quantised as well.

    Args:
        module: calibrated, in evaluation mode.
        placement: of `module`.
        calibration_set: its first `SAMPLES` samples are run.
        names: names of the arguments of `module`, in order.

    Returns:
        Module name → dB; 999 where nothing changed.
    """
    layers = [row.module for row in placement.weights]
    signal, noise = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    for start in range(0, min(SAMPLES, len(calibration_set)), BATCH):
        inputs = calibration_set.tensors(names, slice(start, min(start + BATCH, SAMPLES)))
        with modelopt.float_mode(module):
            wanted = _results(module, layers, inputs)
        for name, found in _results(module, layers, inputs).items():
            signal[name] += float(wanted[name].double().square().sum())
            noise[name] += float((found - wanted[name]).double().square().sum())
    return {name: finite_db(power_db(signal[name], noise[name])) for name in layers}


def _results(module: nn.Module, layers: Sequence[str], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda _, arguments, output: found.__setitem__(name, output)

    handles = [module.get_submodule(name).register_forward_hook(note(name)) for name in layers]
    try:
        with torch.inference_mode():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found

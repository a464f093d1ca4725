"""Calibration: the samples are run, every tensor's histogram is kept, a calibrator makes a range of it.

Neither the order of the samples nor anything but their ids and values can change a range: see `observe`, `histogram`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fmdeploy.errors import ConfigError, DataError
from fmdeploy.quantize import auto, modelopt
from fmdeploy.quantize.build import quantizer_name
from fmdeploy.quantize.calibrators import NAMES, PERCENT, Calibrator, calibrators
from fmdeploy.quantize.grid import fp16_amax
from fmdeploy.quantize.histogram import Histogram
from fmdeploy.quantize.observe import Observation, observe
from fmdeploy.quantize.placement import Placement
from fmdeploy.quantize.ranges import Calibration, Candidate, Range
from fmdeploy.quantize.samples import SPLIT, CalibrationSet, check_inputs, draw, input_statistics, redraw, remarks

__all__ = ["SPLIT", "Calibration", "CalibrationSet", "Calibrator", "Range", "calibrate", "check_inputs", "draw",
           "input_statistics", "redraw"]

Functions = Mapping[str, Callable[[Histogram], float]]

# A tensor that never moves (behind a residual branch whose last BatchNorm starts at zero, say) still needs a scale. Any
# scale holds zero exactly; a very small one would overflow the 32-bit biases of the layer that reads it.
AMAX_OF_ZERO, TINY = 1.0, 1e-6


def calibrate(
    module: nn.Module, placement: Placement, calibration_set: CalibrationSet, input_names: Sequence[str], *,
    calibrator: Calibrator = "max", overrides: Mapping[str, Calibrator] | None = None, percent: float = PERCENT,
) -> Calibration:
    """Set every range of an uncalibrated quantised `module`, in place.

    Weights get the largest magnitude of each output channel. Every range is rounded up to the float16 grid.

    Args:
        module: from `build.build`.
        placement: from there, too.
        calibration_set: its digest and ids go into the result.
        input_names: names of the arguments of `module`, in order.
        calibrator: for activations.
        overrides: tensor of the placement → another calibrator for it, and for the tensors that share its scale.
        percent: of the values other than zero that the percentile calibrator holds.

    Raises:
        ConfigError: no such calibrator, or no such tensor.
        DataError: a tensor was never reached or is not finite, or an input or output holds one single value
            throughout. An inner tensor may: it gets a range that holds that value.
    """
    check_inputs(calibration_set)
    wanted = _wanted(placement, calibrator, overrides or {})
    functions = calibrators(percent)
    seen, chosen = _observe(module, placement, calibration_set, input_names, wanted, functions)
    _refuse_constant_outputs(seen)
    ranges = {}
    for row in placement.activations:
        method, tried = chosen.get(row.quantizer, (wanted[row.quantizer], ()))
        ranges[row.quantizer] = _range(seen.tensors[row.quantizer], method, tried, functions)
    modelopt.set_ranges(module, _all_ranges(module, placement, ranges))
    return Calibration(calibration_set.data, calibration_set.digest, calibration_set.seed, calibration_set.ids, ranges,
                       calibrator, seen.digest, remarks=remarks(calibration_set))


def _wanted(
    placement: Placement, calibrator: Calibrator, overrides: Mapping[str, Calibrator]
) -> dict[str, Calibrator]:
    """Quantizer → its calibrator."""
    if unknown := sorted({calibrator, *overrides.values()} - set(NAMES)):
        raise ConfigError("no such calibrator", where=unknown[0], expected=", ".join(NAMES))
    owner = {tensor: row.quantizer for row in placement.activations for tensor in (row.quantizer, *row.tensors)}
    for tensor in sorted(set(overrides) - set(owner)):
        near = difflib.get_close_matches(tensor, owner, n=3, cutoff=0.4)
        raise ConfigError(f"no quantised tensor is called {tensor!r}", found=f"near: {', '.join(near) or 'none'}")
    wanted: dict[str, Calibrator] = {row.quantizer: calibrator for row in placement.activations}
    given: dict[str, Calibrator] = {}
    for tensor, method in overrides.items():
        name = owner[tensor]
        if given.setdefault(name, method) != method:
            raise ConfigError("tensors that share one scale cannot have two calibrators", where=tensor,
                              expected=given[name], found=method)
        wanted[name] = method
    return wanted


def _observe(
    module: nn.Module, placement: Placement, calibration_set: CalibrationSet, input_names: Sequence[str],
    wanted: Mapping[str, Calibrator], functions: Functions,
) -> tuple[Observation, dict[str, auto.Choice]]:
    """What all samples showed, and what `auto` chose for the quantizers that want it."""
    if "auto" not in wanted.values():
        return observe(module, placement, calibration_set, input_names), {}
    makers, judges = auto.split(calibration_set)
    seen = observe(module, placement, makers, input_names)
    tensors = {}
    for name, histogram in seen.tensors.items():
        if wanted[name] == "auto" and histogram.low != histogram.high:
            tensors[quantizer_name(placement, name)] = {key: amax(histogram) for key, amax in functions.items()}
    choices = auto.choose(module, tensors, judges, input_names)
    if makers is not calibration_set:
        seen = seen.merge(observe(module, placement, judges, input_names))
    return seen, {name: choices[full] for name in wanted if (full := quantizer_name(placement, name)) in choices}


def _range(
    histogram: Histogram, method: str, tried: tuple[Candidate, ...], functions: Functions
) -> Range:
    low, high = histogram.low, histogram.high
    if low == high:
        method, amax = "constant", max(abs(low), TINY) if low else AMAX_OF_ZERO
    else:
        method = "max" if method == "auto" else method  # judged constant by those samples that choose
        amax = functions[method](histogram)
    amax = float(fp16_amax(torch.tensor(amax)))
    return Range(low, high, amax, method, **histogram.summary(amax), candidates=tried)


def _all_ranges(module: nn.Module, placement: Placement, ranges: Mapping[str, Range]) -> dict[str, Tensor]:
    found = {name: fp16_amax(torch.where(amax > 0, amax, AMAX_OF_ZERO))
             for name, amax in modelopt.weight_ranges(module).items()}
    return found | {quantizer_name(placement, name): torch.tensor(row.amax) for name, row in ranges.items()}


def _refuse_constant_outputs(seen: Observation) -> None:
    for number, (low, high) in enumerate(seen.outputs):
        if low == high:
            raise DataError("the student's output is constant over all calibration samples: it has learnt nothing",
                            where=f"output {number}", found=low)

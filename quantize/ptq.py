"""Post-training quantisation: placement and calibration in one call, without training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from fmdeploy.iospec import IOSpec
from fmdeploy.quantize.build import build
from fmdeploy.quantize.calibrate import Calibration, CalibrationSet, calibrate
from fmdeploy.quantize.placement import Placement


@dataclass(frozen=True)
class QuantisedStudent:
    """A calibrated fake-quantised module, in evaluation mode, and the two tables that describe it."""

    module: nn.Module
    placement: Placement
    calibration: Calibration


def ptq(
    student: nn.Module,
    io: IOSpec,
    calibration_set: CalibrationSet,
    *,
    keep_float: Iterable[str] = (),
    quantise_heads: bool = False,
) -> QuantisedStudent:
    """Quantise any float module to INT8.

    Args:
        student: takes the inputs of `io` positionally; not changed, and it need not know fmdeploy.
        io: names and order of the inputs.
        calibration_set: from `calibrate.draw`, or your own arrays.
        keep_float: names of modules that stay float.
        quantise_heads: quantise the last layers before the outputs as well.

    Raises:
        InputError: there is nothing to quantise.
        DataError: the samples cannot calibrate it.
    """
    names = [spec.name for spec in io.inputs]
    module, placement = build(
        student, calibration_set.tensors(names, slice(0, 1)), keep_float=keep_float, quantise_heads=quantise_heads
    )
    calibration = calibrate(module, placement, calibration_set, names)
    return QuantisedStudent(module.eval(), placement, calibration)

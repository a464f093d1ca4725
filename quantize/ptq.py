"""Post-training quantisation: placement and calibration in one call, without training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx, nn

from fmdeploy.data.format import Dataset
from fmdeploy.iospec import IOSpec
from fmdeploy.progress import say
from fmdeploy.quantize.build import build
from fmdeploy.quantize.calibrate import Calibration, CalibrationSet, Calibrator, calibrate, check_inputs
from fmdeploy.quantize.clip import clip
from fmdeploy.quantize.placement import Placement, Request
from fmdeploy.quantize.ranges import SmoothRow
from fmdeploy.quantize.samples import refuse_overlap
from fmdeploy.quantize.smooth import smooth as smooth_graph
from fmdeploy.task import Task


@dataclass(frozen=True)
class QuantisedStudent:
    """A calibrated fake-quantised module, in evaluation mode, and the two tables that describe it."""

    module: nn.Module
    placement: Placement
    calibration: Calibration


def ptq(
    student: nn.Module, io: IOSpec, calibration_set: CalibrationSet, *, request: Request = Request(),  # noqa: B008
    calibrator: Calibrator = "mse", smooth: float | None = None, clip_weights: bool = False,
    judged_on: tuple[Task, Dataset] | None = None,
) -> QuantisedStudent:
    """Quantise any float module to INT8.

    Args:
        student: takes the inputs of `io` positionally; not changed, and it need not know fmdeploy.
        io: names and order of the inputs.
        calibration_set: from `calibrate.draw`, or your own arrays.
        request: what stays float, whether the heads are quantised, a placement file.
        calibrator: of the activations; a placement file may name others for single tensors.
        smooth: strength of SmoothQuant's exact re-scaling (arXiv:2211.10438), 0 to 1; None leaves the network alone.
        clip_weights: narrow weight ranges where that lowers the layer's error (arXiv:2306.00978).
        judged_on: where the result will be judged, for your own arrays: those that its held-out splits hold are
            refused. `calibrate.draw` takes none of them.

    Raises:
        InputError: there is nothing to quantise.
        ConfigError: `request` names what the network does not have.
        DataError: the samples cannot calibrate it, or overlap the evaluation.
    """
    check_inputs(calibration_set, io)
    if judged_on is not None:
        refuse_overlap(calibration_set, *judged_on)
    names = [spec.name for spec in io.inputs]
    smoothed: list[SmoothRow] = []

    def before(graph: fx.GraphModule) -> None:
        if smooth is not None:
            smoothed.extend(smooth_graph(graph, calibration_set, names, smooth))

    module, placement = build(student, calibration_set, names, request, before)
    if smooth is not None:
        _say_in_vain(smoothed)
    calibration = calibrate(module, placement, calibration_set, names, calibrator=calibrator,
                            overrides=placement.calibrators)
    clipped = clip(module, calibration_set, names) if clip_weights else ()
    return QuantisedStudent(module.eval(), placement, replace(calibration, smoothed=tuple(smoothed), clipped=clipped))


def _say_in_vain(smoothed: list[SmoothRow]) -> None:
    """Say why nothing was smoothed, where somebody asked for it."""
    if all(row.skipped for row in smoothed):
        why = f"{smoothed[0].norm} {smoothed[0].skipped}" if smoothed else "there is no LayerNorm in a traced graph"
        say(f"smoothing changed nothing: {why}")

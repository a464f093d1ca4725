"""Cross-domain transfer: a dense probe trained on half of the scenarios, judged on the other half, both ways.

Every test sample is answered by the probe that saw no scenario like its own; the ratio holds that against the probe
that did, which is trained on the other half of the scenarios. IoU is pooled over both ways.

Legend: N test samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.evaluate.metrics import IoU
from fmdeploy.task import Metric
from fmdeploy.teacher.probe import densefit
from fmdeploy.teacher.probe.base import Bench, Judged, NotMeasuredError, StatisticsRung, View
from fmdeploy.teacher.probe.dense import PlanesIoU
from fmdeploy.teacher.probe.labels import dense_planes


@dataclass
class IoURatio(IoU):
    """IoU of the first half of the statistics over IoU of the second."""

    def value(self, total: Array) -> Array:
        """(..., 4): intersection and union away, intersection and union at home."""
        away, home = (PlanesIoU("iou").value(part) for part in np.split(np.asarray(total, np.float64), 2, axis=-1))
        return np.where(home > 0, away / np.where(home > 0, home, 1.0), np.nan)


class Transfer(StatisticsRung):
    """Occupancy IoU on scenarios that the probe never saw."""

    name = "transfer"
    metric_name = "iou"

    def metric(self) -> Metric:
        """IoU away from home."""
        return PlanesIoU("iou")

    def judge(self, view: View, bench: Bench) -> Judged:
        """See `StatisticsRung.judge`; `also` has the IoU on known scenarios and the ratio of the two."""
        away, home = both_ways(view)
        known, ratio = PlanesIoU("in_domain"), IoURatio("ratio")
        return Judged(view.evaluation(self.metric(), away), also={
            "in_domain": (known, view.evaluation(known, home)),
            "ratio": (ratio, view.evaluation(ratio, np.concatenate([away, home], axis=1))),
        })


def both_ways(view: View) -> tuple[Array, Array]:
    """Statistics (N, 2) of test samples by the probe of the other half, and by that of their own.

    Raises:
        NotMeasuredError: there are no two scenarios, or no plane of present vehicles.
    """
    channels = dense_planes(view.subject.task).occupancy
    if not channels:
        raise NotMeasuredError("the task has no plane for transfer")
    if len(np.unique(view.labels("train", densefit.AXIS))) < 2:
        raise NotMeasuredError("all train samples are of one scenario")
    zero, one = (densefit.plane_statistics(densefit.statistics(view, (half,)), channels) for half in (0, 1))
    first_N1 = densefit.half_of(view, "test")[:, None] == 0
    return np.where(first_N1, one, zero), np.where(first_N1, zero, one)

"""Dense rungs: drivable ground, vehicles now, vehicles later, read linearly from frozen features.

The linear segmentation protocol of DINOv2 (arXiv:2304.07193, section 7.4) with closed-form ridge regression in place of
stochastic training, so that a number has no learning rate.
"""

from __future__ import annotations

from abc import abstractmethod

from fmdeploy.evaluate.metrics import Array, IoU
from fmdeploy.task import Metric
from fmdeploy.teacher.probe import densefit
from fmdeploy.teacher.probe.base import Bench, Judged, NotMeasuredError, StatisticsRung, View
from fmdeploy.teacher.probe.labels import Planes, dense_planes


class DenseRung(StatisticsRung):
    """IoU of some planes, mean over them, pooled over samples."""

    metric_name = "iou"

    @staticmethod
    @abstractmethod
    def channels(planes: Planes) -> tuple[int, ...]:
        """Which planes of the dense output are judged."""

    def metric(self) -> Metric:
        """IoU; its formula asks for the number of planes, which `judge` gives."""
        return PlanesIoU("iou")

    def judge(self, view: View, bench: Bench) -> Judged:
        """See `StatisticsRung.judge`."""
        channels = self.channels(dense_planes(view.subject.task))
        if not channels:
            raise NotMeasuredError(f"the task has no plane for {self.name}")
        stats = densefit.plane_statistics(densefit.statistics(view), channels)
        dense = densefit.fit(view)
        chosen = {"strength": [dense.strengths[c] for c in channels],
                  "threshold": [dense.thresholds[c] for c in channels]}
        return Judged(view.evaluation(self.metric(), stats), chosen=chosen)


class PlanesIoU(IoU):
    """IoU of as many planes as the statistics have."""

    def per_channel(self, total: Array) -> Array:
        """IoU of each plane (..., C) from (..., 2 C)."""
        return IoU(self.name, channels=tuple(range(total.shape[-1] // 2))).per_channel(total)


class Segmentation(DenseRung):
    """Drivable ground."""

    name = "segmentation"

    @staticmethod
    def channels(planes: Planes) -> tuple[int, ...]:
        """The ground."""
        return planes.segmentation


class Occupancy(DenseRung):
    """Vehicles now."""

    name = "occupancy"

    @staticmethod
    def channels(planes: Planes) -> tuple[int, ...]:
        """The present."""
        return planes.occupancy


class Forecasting(DenseRung):
    """Vehicles at every later horizon."""

    name = "forecasting"

    @staticmethod
    def channels(planes: Planes) -> tuple[int, ...]:
        """The future."""
        return planes.forecasting

"""Metrics as per-sample sufficient statistics.

Legend: B samples, C channels, H rows, W columns, K statistics of one sample, M bins; `...` any leading axes.

A metric maps one batch to float64 statistics (B, K) and a *sum* of such rows to its value. Pooled over samples, never a
mean of per-sample values: an empty scene has no IoU of its own but still contributes its false alarms.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fmdeploy.errors import DataError

Array = npt.NDArray[np.float64]
Arrays = dict[str, npt.NDArray[np.generic]]

OCCUPANCY_CHANNELS = (0, 1, 2, 3)
DRIVABLE_CHANNELS = (4,)
NUM_BINS = 15
ValueT = TypeVar("ValueT")


def target_of(targets: Mapping[str, ValueT], name: str) -> ValueT:
    """One target of a batch.

    Raises:
        DataError: the samples lack it, as those of a data set without labels do.
    """
    if name not in targets:
        raise DataError(f"the samples have no target {name!r}", where="data",
                        found=", ".join(sorted(targets)) or "none",
                        fix="Use a data set with labels, or an objective that needs none")
    return targets[name]


@dataclass
class Metric(ABC):
    """One number about a set of samples: what `fmdeploy.task.Metric` asks for, over one output and one target.

    Attributes:
        name: Key of the statistics in an evaluation; unique within a task.
        output: Name of the model output that is judged.
        target: Name of the target array.
        higher_is_better: True for scores, False for errors.
        unit: Unit of the value; all built-in metrics are fractions of one.
    """

    name: str
    output: str
    target: str
    higher_is_better: bool = field(default=True, init=False)
    unit: str = field(default="1", init=False)

    @abstractmethod
    def statistics(self, outputs: Arrays, targets: Arrays) -> Array:
        """Return float64 (B, K) statistics whose sum over samples determines the value."""

    @abstractmethod
    def value(self, total: Array) -> Array:
        """Return the value (...,) of summed statistics (..., K); NaN where it is undefined, e.g. without samples."""


def _planes(metric: Metric, channels: Sequence[int], outputs: Arrays, targets: Arrays) -> tuple[Array, Array]:
    """Select channels and flatten space: logits and labels as (B, C, H*W)."""
    logits_BCHW = outputs[metric.output][:, list(channels)]
    labels_BCHW = target_of(targets, metric.target)[:, list(channels)]
    flat = (*logits_BCHW.shape[:2], math.prod(logits_BCHW.shape[2:]))
    return logits_BCHW.reshape(flat), labels_BCHW.reshape(flat)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Divide; 0/0 is NaN without a warning."""
    safe = np.where(denominator > 0, denominator, 1.0)
    return np.where(denominator > 0, numerator / safe, np.nan)


def sigmoid(logits: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Return 1 / (1 + exp(-x)) in float32, without overflow: tanh saturates where exp does not."""
    half = np.asarray(logits, np.float32) * np.float32(0.5)
    result: npt.NDArray[np.float32] = (np.tanh(half) + np.float32(1)) * np.float32(0.5)
    return result


def softmax(logits: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Return the softmax over the last axis in float32."""
    raw = np.asarray(logits, np.float32)
    powers = np.exp(raw - raw.max(axis=-1, keepdims=True))
    result: npt.NDArray[np.float32] = powers / powers.sum(axis=-1, keepdims=True)
    return result


@dataclass
class IoU(Metric):
    """Intersection over union at threshold 0.5 (logit > 0), pooled over samples, mean over channels.

    J(A, B) = |A and B| / |A or B| per channel (Jaccard 1901; pooled form: PASCAL VOC, Everingham 2010, section 4.2.2).
    Statistics: per channel intersection, then per channel union, both in cells. A channel with an empty union is
    undefined and makes the mean NaN.
    """

    name: str
    output: str = "bev"
    target: str = "bev"
    channels: tuple[int, ...] = OCCUPANCY_CHANNELS

    def statistics(self, outputs: Arrays, targets: Arrays) -> Array:
        """Return (B, 2C): intersections, unions."""
        logits, labels = _planes(self, self.channels, outputs, targets)
        predicted, present = logits > 0, labels != 0
        # NaN > 0 is False: a broken model would look like an empty, plausible one. Keep the NaN in the statistics.
        broken = ~np.isfinite(logits).all(axis=-1)
        both = np.where(broken, np.nan, np.count_nonzero(predicted & present, axis=-1))
        either = np.where(broken, np.nan, np.count_nonzero(predicted | present, axis=-1))
        return np.concatenate([both, either], axis=1).astype(np.float64)

    def value(self, total: Array) -> Array:
        """Return the mean IoU over channels."""
        return np.asarray(self.per_channel(total).mean(axis=-1))

    def per_channel(self, total: Array) -> Array:
        """Return the IoU of each channel (..., C)."""
        count = len(self.channels)
        return _ratio(total[..., :count], total[..., count:])


@dataclass
class OccupancyIoU(IoU):
    """Vehicle occupancy IoU: the mean over the horizons t, +0.4, +0.8, +1.6 s. The demo task's primary metric."""

    name: str = "iou"


@dataclass
class DrivableIoU(IoU):
    """IoU of the drivable area at t."""

    name: str = "drivable_iou"
    channels: tuple[int, ...] = DRIVABLE_CHANNELS


def horizon_metrics(labels: Sequence[str], *, output: str = "bev", target: str = "bev") -> tuple[IoU, ...]:
    """Return one IoU a horizon, named `iou@<label>`; label i belongs to channel i."""
    return tuple(IoU(f"iou@{label}", output, target, (channel,)) for channel, label in enumerate(labels))


@dataclass
class SoftIoU(IoU):
    """IoU of probabilities: sum(p*y) / sum(p + y - p*y), mean over channels (Rahman and Wang 2016, equation 3).

    Needs no threshold, so it also moves when a model is only less sure.
    """

    name: str = "soft_iou"

    def statistics(self, outputs: Arrays, targets: Arrays) -> Array:
        """Return (B, 2C): soft intersections, soft unions."""
        logits, labels = _planes(self, self.channels, outputs, targets)
        chance = sigmoid(logits)
        truth = (labels != 0).astype(np.float32)
        both = np.einsum("bcn,bcn->bc", chance, truth, dtype=np.float64)
        either = chance.sum(-1, dtype=np.float64) + truth.sum(-1, dtype=np.float64) - both
        return np.concatenate([both, either], axis=1)


@dataclass
class Accuracy(Metric):
    """Share of samples whose largest logit is the label; a label below 0 is unknown. Statistics: (correct, count)."""

    name: str = "accuracy"
    output: str = "scene"
    target: str = "scene"

    def statistics(self, outputs: Arrays, targets: Arrays) -> Array:
        """Return (B, 2): 1 where correct, and 1; NaN where a logit is not finite."""
        logits_BC = np.asarray(outputs[self.output], np.float32)
        label_B = np.asarray(target_of(targets, self.target), np.int64)
        correct = (logits_BC.argmax(axis=-1) == label_B).astype(np.float64)
        correct[~np.isfinite(logits_BC).all(axis=-1)] = np.nan
        return np.stack([correct, label_B >= 0], axis=1).astype(np.float64)

    def value(self, total: Array) -> Array:
        """Return correct / count."""
        return _ratio(total[..., 0], total[..., 1])


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: per bin the mean confidence, the observed frequency and the number of predictions (M,)."""

    confidence: Array
    frequency: Array
    count: Array


@dataclass
class CalibrationError(Metric):
    """Expected calibration error over equal-width bins of confidence, arXiv 1706.04599 equation 3.

    ECE = sum_m n_m / n * |mean confidence_m - mean outcome_m|. Statistics: per bin count, sum of confidence, sum of
    outcome (3M columns), from which `reliability` also reads the diagram.
    """

    higher_is_better: bool = field(default=False, init=False)

    def value(self, total: Array) -> Array:
        """Return the expected calibration error."""
        count, confidence, outcome = np.split(total, 3, axis=-1)
        return _ratio(np.abs(confidence - outcome).sum(axis=-1), count.sum(axis=-1))

    def reliability(self, total: Array) -> Reliability:
        """Return the reliability diagram of summed statistics (3M,); NaN in empty bins."""
        count, confidence, outcome = np.split(total, 3, axis=-1)
        return Reliability(_ratio(confidence, count), _ratio(outcome, count), count)


@dataclass
class ECE(CalibrationError):
    """Calibration error of per-cell probabilities: the confidence is p = sigmoid(logit), the outcome the label."""

    name: str = "ece"
    output: str = "bev"
    target: str = "bev"
    channels: tuple[int, ...] = OCCUPANCY_CHANNELS

    def statistics(self, outputs: Arrays, targets: Arrays) -> Array:
        """Return (B, 3M) bin counts, confidence sums and outcome sums over all cells of a sample."""
        logits, labels = _planes(self, self.channels, outputs, targets)
        flat = (len(logits), math.prod(logits.shape[1:]))
        return _binned(sigmoid(logits).reshape(flat), (labels != 0).reshape(flat))


@dataclass
class TopLabelECE(CalibrationError):
    """Calibration error of a classifier: the confidence is the largest softmax probability, the outcome being right."""

    name: str = "scene_ece"
    output: str = "scene"
    target: str = "scene"

    def statistics(self, outputs: Arrays, targets: Arrays) -> Array:
        """Return (B, 3M) with exactly one prediction a sample."""
        chances_BC, label_B = softmax(outputs[self.output]), np.asarray(target_of(targets, self.target), np.int64)
        correct = chances_BC.argmax(axis=-1) == label_B
        counted: Array = _binned(chances_BC.max(axis=-1)[:, None], correct[:, None]) * (label_B >= 0)[:, None]
        return counted


def _binned(confidence_BN: npt.NDArray[np.float32], outcome_BN: npt.NDArray[np.bool_]) -> Array:
    """Histogram each sample on its own, in one bincount: bin m covers [m/M, (m+1)/M), the last one includes 1."""
    samples = len(confidence_BN)
    finite = np.isfinite(confidence_BN)
    slots = np.clip(np.where(finite, confidence_BN, 0) * NUM_BINS, 0, NUM_BINS - 1).astype(np.intp)
    slots += np.arange(samples)[:, None] * NUM_BINS
    flat, size = slots.ravel(), samples * NUM_BINS
    count = np.bincount(flat, minlength=size)
    sums = np.bincount(flat, weights=confidence_BN.ravel(), minlength=size)  # keeps NaN
    hits = np.bincount(flat[outcome_BN.ravel()], minlength=size)
    columns = [part.astype(np.float64).reshape(samples, NUM_BINS) for part in (count, sums, hits)]
    return np.concatenate(columns, axis=1)

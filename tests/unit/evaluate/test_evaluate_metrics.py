"""Every metric against a computation by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmdeploy.evaluate.metrics import (
    ECE,
    Accuracy,
    DrivableIoU,
    IoU,
    Metric,
    OccupancyIoU,
    SoftIoU,
    TopLabelECE,
    horizon_metrics,
    sigmoid,
)


def _bev(*planes: list[list[float]]) -> np.ndarray:
    """One sample (1, C, 2, 2)."""
    return np.asarray([planes], np.float32)


def _value(metric: Metric, outputs: np.ndarray, targets: np.ndarray) -> float:
    key = metric.output
    return float(metric.value(metric.statistics({key: outputs}, {metric.target: targets}).sum(axis=0)))


def test_iou_counts_cells() -> None:
    logits = _bev([[1, 1], [-1, -1]], [[1, -1], [-1, -1]])
    labels = _bev([[1, 0], [1, 0]], [[1, 0], [0, 0]])
    metric = IoU("two", channels=(0, 1))
    # plane 0: 1 of 3 cells, plane 1: 1 of 1
    assert _value(metric, logits, labels) == pytest.approx((1 / 3 + 1) / 2)
    rows = metric.statistics({"bev": logits}, {"bev": labels})
    assert rows.tolist() == [[1, 1, 3, 1]]


def test_iou_is_pooled_over_samples_not_averaged() -> None:
    metric = IoU("one", channels=(0,))
    logits = np.concatenate([_bev([[1, 1], [1, 1]]), _bev([[1, -1], [-1, -1]])])
    labels = np.concatenate([_bev([[0, 0], [0, 1]]), _bev([[1, 0], [0, 0]])])
    assert _value(metric, logits, labels) == pytest.approx(2 / 5)


def test_empty_union_and_nan_are_undefined() -> None:
    metric = IoU("one", channels=(0,))
    empty = _bev([[-1, -1], [-1, -1]])
    assert np.isnan(_value(metric, empty, np.zeros_like(empty)))
    broken = _bev([[np.nan, -1], [-1, -1]])
    assert np.isnan(_value(metric, broken, np.ones_like(broken)))


def test_threshold_is_one_half() -> None:
    metric = IoU("one", channels=(0,))
    logits = _bev([[0.0, 1e-6], [-1e-6, -1]])
    assert _value(metric, logits, _bev([[0, 1], [0, 0]])) == 1


def test_default_channels_and_horizons() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 4, 4)).astype(np.float32)
    labels = (rng.random((3, 5, 4, 4)) < 0.5).astype(np.uint8)
    singles = [_value(metric, logits, labels) for metric in horizon_metrics(("t", "+0.4s", "+0.8s", "+1.6s"))]
    assert _value(OccupancyIoU(), logits, labels) == pytest.approx(np.mean(singles))
    assert _value(DrivableIoU(), logits, labels) == pytest.approx(_value(IoU("d", channels=(4,)), logits, labels))
    assert [metric.name for metric in horizon_metrics(("t", "+0.4s"))] == ["iou@t", "iou@+0.4s"]


def test_soft_iou_by_hand() -> None:
    logits = _bev([[np.log(3), -np.log(3)], [0, 0]])  # probabilities .75, .25, .5, .5
    labels = _bev([[1, 0], [1, 0]])
    both = 0.75 + 0.5
    either = (0.75 + 0.25 + 0.5 + 0.5) + 2 - both
    assert _value(SoftIoU(channels=(0,)), logits, labels) == pytest.approx(both / either, rel=1e-6)


def test_accuracy() -> None:
    logits = np.array([[2, 1], [0, 1], [0, 1]], np.float32)
    assert _value(Accuracy(), logits, np.array([0, 1, 0])) == pytest.approx(2 / 3)
    assert np.isnan(_value(Accuracy(), np.full((1, 2), np.nan, np.float32), np.array([0])))


def test_ece_by_hand() -> None:
    # .95 twice with outcomes 1 and 0, .05 twice with 0 and 0
    point = float(np.log(0.95 / 0.05))
    logits = _bev([[point, point], [-point, -point]])
    metric = ECE(channels=(0,))
    expected = 0.5 * abs(0.95 - 0.5) + 0.5 * abs(0.05 - 0.0)
    assert _value(metric, logits, _bev([[1, 0], [0, 0]])) == pytest.approx(expected, abs=1e-6)
    assert not metric.higher_is_better


def test_reliability_is_recoverable_from_the_statistics() -> None:
    point = float(np.log(0.95 / 0.05))
    metric = ECE(channels=(0,))
    stats = metric.statistics({"bev": _bev([[point, point], [-point, -point]])}, {"bev": _bev([[1, 0], [0, 0]])})
    diagram = metric.reliability(stats.sum(axis=0))
    assert diagram.count.tolist() == [2] + [0] * 13 + [2]
    assert diagram.confidence[[0, 14]] == pytest.approx([0.05, 0.95])
    assert diagram.frequency[[0, 14]] == pytest.approx([0, 0.5])
    assert np.isnan(diagram.confidence[7])


def test_top_label_ece_by_hand() -> None:
    logits = np.log(np.array([[0.9, 0.1], [0.6, 0.4]], np.float32))
    # 0.9 right, 0.6 wrong: two bins
    assert _value(TopLabelECE(), logits, np.array([0, 1])) == pytest.approx(0.5 * 0.1 + 0.5 * 0.6, abs=1e-6)


def test_certain_prediction_falls_into_the_last_bin() -> None:
    stats = ECE(channels=(0,)).statistics({"bev": _bev([[200, 200], [-200, -200]])}, {"bev": _bev([[1, 1], [0, 0]])})
    assert stats[0, :15].tolist() == [2] + [0] * 13 + [2]


def test_nan_logit_makes_ece_undefined() -> None:
    assert np.isnan(_value(ECE(channels=(0,)), _bev([[np.nan, 0], [0, 0]]), _bev([[1, 0], [0, 0]])))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), weights=st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_repeating_a_sample_equals_weighting_its_statistics(seed: int, weights: list[int]) -> None:
    """What makes a bootstrap draw a weighted sum."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(6, 5, 3, 3)).astype(np.float32)
    labels = (rng.random((6, 5, 3, 3)) < 0.5).astype(np.uint8)
    index = np.repeat(np.arange(6), weights)
    for metric in (OccupancyIoU(), SoftIoU(), ECE()):
        stats = metric.statistics({"bev": logits}, {"bev": labels})
        weighted = metric.value(np.asarray(weights, np.float64) @ stats)
        repeated = metric.statistics({"bev": logits[index]}, {"bev": labels[index]}).sum(axis=0)
        assert np.allclose(weighted, metric.value(repeated), equal_nan=True)


def test_sigmoid_does_not_overflow() -> None:
    assert sigmoid(np.array([-1e4, 0, 1e4], np.float32)).tolist() == [0, 0.5, 1]

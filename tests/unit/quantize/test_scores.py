"""A drop is what got worse, whether the metric counts hits or errors."""

from __future__ import annotations

import pytest

from fmdeploy.evaluate.metrics import ECE, OccupancyIoU
from fmdeploy.quantize.scores import Values, relative_drop


def test_a_drop_is_positive_where_the_candidate_is_worse() -> None:
    before: dict[str, Values] = {"test": {"iou": 0.8, "ece": 0.1}}
    after: dict[str, Values] = {"test": {"iou": 0.6, "ece": 0.15}}
    assert relative_drop(before, after, OccupancyIoU()) == {"test": pytest.approx(0.25)}
    assert relative_drop(before, after, ECE()) == {"test": pytest.approx(0.5)}


def test_a_drop_from_nothing_is_undefined() -> None:
    worse: dict[str, Values] = {"test": {"iou": 0.6}, "val": {"iou": None}}
    assert relative_drop({"test": {"iou": 0.0}}, worse, OccupancyIoU()) == {"test": None, "val": None}

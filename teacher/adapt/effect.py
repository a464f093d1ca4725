"""What a change of a teacher does to its primary metric on one dataset, with an interval over simulations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fmdeploy.data.format import Dataset
from fmdeploy.evaluate.bootstrap import Interval, drop
from fmdeploy.evaluate.evaluation import Evaluation, Predict, data_key, evaluate
from fmdeploy.task import Metric, Task


@dataclass(frozen=True)
class Effect:
    """Two evaluations of the same samples.

    Attributes:
        metric: The task's primary one.
        before: Without the change.
        after: With it.
    """

    metric: Metric
    before: Evaluation
    after: Evaluation

    def fall(self) -> Interval:
        """By which share of its value the metric got worse; negative where it got better."""
        return drop(self.before, self.after, self.metric)

    def as_metrics(self) -> dict[str, Any]:
        """Plain numbers; null where one is undefined."""
        fall = self.fall()
        return {
            "before": _plain(self.before.value(self.metric)), "after": _plain(self.after.value(self.metric)),
            "fall": {"value": _plain(fall.value), "low": _plain(fall.low), "high": _plain(fall.high)},
        }


def measure_effect(before: Predict, after: Predict, task: Task, data: Dataset) -> Effect:
    """Evaluate both on the test split, or on the validation split where there is no other."""
    split = "test" if data.splits.get("test") else "val"
    samples, metrics = task.samples(data, split), task.metrics()[:1]
    key = data_key(data.digest, split)
    return Effect(metrics[0], evaluate(before, samples, metrics, data=key), evaluate(after, samples, metrics, data=key))


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None

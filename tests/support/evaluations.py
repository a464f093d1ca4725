"""Evaluations made by hand, of a metric that is a plain mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmdeploy.evaluate.evaluation import Evaluation

Array = np.ndarray[Any, Any]


@dataclass
class MeanMetric:
    """The mean of one number a sample."""

    name: str = "mean"
    higher_is_better: bool = True

    def statistics(self, outputs: dict[str, Array], targets: dict[str, Array]) -> Array:
        """(value, 1)."""
        return np.stack([outputs["x"], np.ones(len(outputs["x"]))], axis=1)

    def value(self, total: Array) -> Array:
        """Sum of values over count."""
        with np.errstate(invalid="ignore"):
            return np.asarray(total[..., 0] / np.where(total[..., 1] > 0, total[..., 1], np.nan))


def evaluation(
    values: Sequence[float] | Array, *, groups: Array | None = None, slices: Mapping[str, Array] | None = None,
    data: str = "data:test",
) -> Evaluation:
    """One sample a value; groups of two unless given."""
    numbers = np.asarray(values, np.float64)
    count = len(numbers)
    stats = MeanMetric().statistics({"x": numbers}, {})
    return Evaluation(
        tuple(f"s/{i}" for i in range(count)), np.arange(count) // 2 if groups is None else groups, dict(slices or {}),
        {"mean": stats}, data,
    )

"""How good a trained network is: the files that every TEACHER and STUDENT carries.

    evaluation.{safetensors,json}   per-sample statistics on the test split
    validation.{safetensors,json}   the same on the validation split
    examples.safetensors            outputs for a few test samples
    calibration_guard.json          calibration error and event frequencies on the test split, as it was recorded
    curve.json                      losses over the steps, for plots
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fmdeploy.data.format import Dataset
from fmdeploy.draft import Draft
from fmdeploy.evaluate.evaluation import Evaluation, evaluate
from fmdeploy.evaluate.examples import save_examples
from fmdeploy.evaluate.frequency import calibration_guard
from fmdeploy.evaluate.metrics import CalibrationError
from fmdeploy.task import Arrays, Metric, Task

EVALUATIONS = {"val": "validation", "test": "evaluation"}
GUARD = "calibration_guard.json"
CURVE_POINTS = 400


def write_scores(
    draft: Draft, predict: Callable[[Arrays], Arrays], task: Task, data: Dataset
) -> dict[str, dict[str, float | None]]:
    """Evaluate on every held-out split that the dataset has.

    Returns:
        Split → metric → value, null where it is undefined.
    """
    found = {}
    for split, name in EVALUATIONS.items():
        if not data.splits.get(split):
            continue
        samples = task.samples(data, split)
        evaluation = evaluate(predict, samples, (*task.metrics(), *task.events()), data=f"{data.digest}:{split}")
        evaluation.save(draft, name)
        found[split] = metric_values(evaluation, task.metrics())
        if split == "test":
            save_examples(draft, predict, samples)
            if task.events():
                errors = [metric for metric in task.metrics() if isinstance(metric, CalibrationError)]
                draft.write_json(GUARD, calibration_guard(evaluation, errors, task.events()))
    return found


def metric_values(evaluation: Evaluation, metrics: tuple[Metric, ...]) -> dict[str, float | None]:
    """Every metric's value; null where it is undefined."""
    values = {metric.name: evaluation.value(metric) for metric in metrics}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def write_curve(draft: Draft, records: list[dict[str, Any]]) -> None:
    """Loss, its parts and the learning rate over the steps, thinned to what a plot can show."""
    stride = max(1, len(records) // CURVE_POINTS)
    kept = [r for r in records if r["step"] % stride == 0 or r is records[-1]]
    names = [name for name in records[0] if name != "step"]
    draft.write_json("curve.json", {_series(name): [[r["step"], r[name]] for r in kept] for name in names})


def _series(name: str) -> str:
    return name if name in ("loss", "lr", "grad_norm") else f"loss.{name}"

"""What a bundle loses without a sensor: one row a tier and declared mode, measured through the runtime itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fmdeploy.arrays import Arrays
from fmdeploy.budgets import Budgets, SensorLoss
from fmdeploy.errors import DataError
from fmdeploy.evaluate.evaluation import Evaluation, evaluate
from fmdeploy.evaluate.gates import Row, not_measured, overall_gate
from fmdeploy.runtime.bundle import Bundle
from fmdeploy.runtime.check.tier import CheckedTier
from fmdeploy.runtime.session import Runtime
from fmdeploy.task import Metric, Samples


def sensor_rows(
    bundle: Bundle, tiers: Sequence[CheckedTier], samples: Samples, metric: Metric, limits: Budgets
) -> list[Row]:
    """Evaluate every tier without each sensor that may be missing, and gate what that costs.

    A mode that the bundle declares is measured whatever budgets are asked for: the runtime would use it. A mode that
    only the given budgets have is not measured, since the runtime would refuse such frames.
    """
    declared = bundle.budgets.sensor_loss
    wanted = declared | limits.sensor_loss
    return [_row(tier, name, mode, name in declared, samples, metric, limits)
            for tier in tiers for name, mode in wanted.items()]


def _row(
    tier: CheckedTier, name: str, mode: SensorLoss, declared: bool, samples: Samples, metric: Metric, limits: Budgets
) -> Row:
    title = f"{tier.name} {metric.name} drop without {name}"
    if tier.evaluation is None or tier.evaluator is None:
        reason = f"the tier was refused: {tier.report.reason}"
        return not_measured(title, reason, limit=mode.max_drop, unit="1")
    if not declared:
        return not_measured(title, "the bundle does not declare this mode", limit=mode.max_drop, unit="1")
    found = _evaluate(tier.evaluator, name, samples, metric, tier.evaluation.data)
    return overall_gate(title, tier.evaluation, found, metric, mode.max_drop, limits.accuracy)


def _evaluate(runtime: Runtime, name: str, samples: Samples, metric: Metric, data: str) -> Evaluation:
    def predict(inputs: Arrays) -> Arrays:
        rows: list[Arrays] = []
        for row in range(len(next(iter(inputs.values())))):
            there = {key: array[row] for key, array in inputs.items() if key != name}
            frame = runtime.infer(there, missing=(name,))
            if not frame.outputs:
                text = "; ".join(f"{found.code.value} {found.detail}" for found in frame.findings)
                raise DataError(f"the runtime refuses an evaluation sample: {text}", where=f"without {name}")
            rows.append(frame.outputs)
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    return evaluate(predict, samples, (metric,), data=data)

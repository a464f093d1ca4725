"""The rows of `evaluate`: one a fault, with what was published and what would have been.

Legend: N judged samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fmdeploy.evaluate.bootstrap import drop
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.runtime.trouble.faults import Fault
from fmdeploy.runtime.trouble.judge import Judged
from fmdeploy.strictjson import finite_or_none
from fmdeploy.task import Metric


def trouble_rows(
    faults: Sequence[Fault], judged: Sequence[Judged], evaluations: Sequence[Evaluation], metric: Metric
) -> list[dict[str, Any]]:
    """One row a fault; the first fault is the clean control that all are held against, sample by sample."""
    control = evaluations[0]
    return [_row(fault, each, evaluation, control, metric)
            for fault, each, evaluation in zip(faults, judged, evaluations, strict=True)]


def _row(fault: Fault, judged: Judged, evaluation: Evaluation, control: Evaluation, metric: Metric) -> dict[str, Any]:
    valid, count = judged.valid, len(judged.valid)
    lost = drop(control, evaluation, metric, mask=valid) if valid.any() else None
    unguarded = drop(control, evaluation, metric)
    return {
        "fault": fault.name, "level": fault.level, "frames": count, "valid": float(valid.mean()),
        "reasons": {code: number / count for code, number in sorted(judged.reasons.items())},
        "value_unguarded": finite_or_none(evaluation.value(metric)),
        "drop_unguarded": finite_or_none(unguarded.value),
        "value_valid": finite_or_none(evaluation.value(metric, valid)) if valid.any() else None,
        "clean_valid": finite_or_none(control.value(metric, valid)) if valid.any() else None,
        "drop_valid": finite_or_none(lost.value) if lost else None,
        "interval": [finite_or_none(lost.low), finite_or_none(lost.high)] if lost else None,
        "groups": len(np.unique(evaluation.groups[valid])),
    }


def outcome_lines(found: dict[str, Any]) -> tuple[str, ...]:
    """The rows as text."""
    lines = [f"{'fault':32} {'valid':>7} {found['metric']:>8}  {'drop':>8}  {'unguarded':>8}"]
    for row in found["rows"]:
        name = f"{row['fault']} {row['level']}".strip()
        cells = _cell(row["value_valid"]), _cell(row["drop_valid"], "8.1%"), _cell(row["value_unguarded"])
        lines.append(f"{name:32} {row['valid']:7.1%} " + "  ".join(cells))
    return tuple(lines)


def _cell(value: float | None, form: str = "8.4f") -> str:
    return f"{'-':>8}" if value is None else f"{value:{form}}"

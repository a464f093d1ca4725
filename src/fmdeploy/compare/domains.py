"""Old and new, side by side, in every domain and slice; what was forgotten, and what was gained.

Forgetting of a domain is what the candidate lost there against the deployed model (arXiv:1706.08840, section 3, with
one step of learning); forward transfer is what the deployed model already knew of a new domain beyond the best trivial
prediction, before anything was learnt there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fmdeploy.budgets import AccuracyBudget
from fmdeploy.compare.judged import Judged
from fmdeploy.evaluate.bootstrap import Interval, check_paired, drop
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.evaluate.gates import Row, overall_gate, slice_gates
from fmdeploy.strictjson import finite_or_none

Json = dict[str, Any]


def domain_rows(
    candidate: Judged, deployed: Judged, limits: Mapping[str, float], slice_limit: float, budget: AccuracyBudget
) -> tuple[list[Row], list[Json]]:
    """Gates of every domain and its slices, and the same as a table of old and new.

    Args:
        candidate: The new side.
        deployed: The old side, evaluated on the same samples.
        limits: Domain → relative drop allowed overall.
        slice_limit: Relative drop allowed in every slice.
        budget: Numbers of samples, slices and confidence.

    Raises:
        DataError: the two sides were evaluated on different samples.
    """
    rows, table = [], []
    several = len(candidate.evaluations) > 1
    for name, after in candidate.evaluations.items():
        before = deployed.evaluations[name]
        check_paired(before, after)
        title = f"candidate {candidate.metric.name} drop vs deployed" + (f" in {name}" if several else "")
        metric = candidate.metric
        mine = [overall_gate(title, before, after, metric, limits[name], budget),
                *slice_gates(title, before, after, metric, slice_limit, budget)]
        rows += mine
        masks = after.masks(axis for axis in budget.slices if axis in after.slices)
        for row in mine:
            mask = masks.get(row.slice) if row.slice is not None else None
            if row.slice is None or mask is not None:
                table.append({"domain": name, "slice": row.slice, "metric": metric.name, **_row_json(row),
                              "old": finite_or_none(before.value(metric, mask)),
                              "new": finite_or_none(after.value(metric, mask))})
    return rows, table


def _row_json(row: Row) -> Json:
    low, high = row.interval or (None, None)
    return {"drop": {"value": row.value, "low": low, "high": high}, "limit": row.limit, "result": row.result.value,
            "samples": row.n_samples}


def table_lines(table: Sequence[Json]) -> Iterator[str]:
    """The table for people."""
    yield f"{'domain':16} {'slice':24} {'old':>8} {'new':>8} {'drop':>8}  result"
    for row in table:
        values = (row["old"], row["new"], row["drop"]["value"])
        numbers = " ".join(f"{'-':>8}" if value is None else f"{value:8.4f}" for value in values)
        yield f"{row['domain']:16} {row['slice'] or 'overall':24} {numbers}  {row['result']}"


def continual(candidate: Judged, deployed: Judged, new: Iterable[str], trivial: Mapping[str, Evaluation]) -> Json:
    """Forgetting on the old domains; gain and forward transfer on the new ones, absolute in the metric.

    Args:
        candidate: After learning.
        deployed: Before.
        new: Domains that the candidate was to learn.
        trivial: New domain → its best trivial prediction, where the task has any.
    """
    learnt, metric = set(new), candidate.metric
    found: Json = {"forgetting": {}, "gain": {}, "forward_transfer": {}}
    for name, after in candidate.evaluations.items():
        before = deployed.evaluations[name]
        lost = drop(before, after, metric, relative=False)
        if name not in learnt:
            found["forgetting"][name] = _spread(lost)
            continue
        found["gain"][name] = _spread(lost, sign=-1)
        ahead = drop(before, trivial[name], metric, relative=False) if name in trivial else None
        found["forward_transfer"][name] = _spread(ahead) if ahead else None
    values = [each["value"] for each in found["forgetting"].values() if each["value"] is not None]
    found["mean_forgetting"] = sum(values) / len(values) if values else None
    return found


def _spread(interval: Interval, sign: int = 1) -> dict[str, float | None]:
    ends = sorted((sign * interval.low, sign * interval.high))
    return {"value": finite_or_none(sign * interval.value), "low": finite_or_none(ends[0]),
            "high": finite_or_none(ends[1])}

"""The rows of a check, and which tier would serve."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fmdeploy.budgets import AccuracyBudget, TargetBudget
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.evaluate.gates import Result, Row, limit_gate, not_measured, overall_gate, slice_gates
from fmdeploy.runtime.bundle import Bundle
from fmdeploy.runtime.check.tier import CheckedTier
from fmdeploy.runtime.measure.conditions import Conditions
from fmdeploy.runtime.measure.latency import Speedup, speedup, summary
from fmdeploy.runtime.measure.memory import PeakMemory
from fmdeploy.task import Metric

REFERENCE = "fp32"
MIB = 2**20


@dataclass(frozen=True)
class Preference:
    """The tier that would serve on this machine, and why."""

    tier: str | None
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {"tier": self.tier, "reason": self.reason}


def accuracy_rows(
    tiers: Sequence[CheckedTier], teacher: Evaluation | None, metric: Metric, budget: AccuracyBudget
) -> list[Row]:
    """Return self-test rows, rows on the guards' false alarms, and accuracy rows of all tiers."""
    fp32 = next((tier.evaluation for tier in tiers if tier.name == REFERENCE), None)
    rows = []
    for tier in tiers:
        rows += [_self_test_row(tier), *_invalid_rows(tier, budget)]
        rows += _versus(tier, "teacher", teacher, "the bundle has no evaluation of the teacher on this data",
                        metric, budget, budget.max_drop_vs_teacher, budget.max_slice_drop_vs_teacher)
        if tier.name != REFERENCE:
            rows += _versus(tier, REFERENCE, fp32, "the FP32 tier was not evaluated here", metric, budget,
                            budget.max_drop_vs_fp32, budget.max_slice_drop)
    return rows


def _versus(
    tier: CheckedTier, who: str, reference: Evaluation | None, missing: str, metric: Metric, budget: AccuracyBudget,
    limit: float | None, slice_limit: float | None,
) -> list[Row]:
    name = f"{tier.name} {metric.name} drop vs {who}"
    if tier.evaluation is None or reference is None:
        reason = f"the tier was refused: {tier.report.reason}" if tier.evaluation is None else missing
        kinds = ((name, limit), (f"{name} per slice", slice_limit))
        return [not_measured(title, reason, limit=bound, unit="1") for title, bound in kinds if bound is not None]
    rows = []
    if limit is not None:
        rows.append(overall_gate(name, reference, tier.evaluation, metric, limit, budget))
    if slice_limit is not None:
        rows += slice_gates(name, reference, tier.evaluation, metric, slice_limit, budget)
    return rows


def _self_test_row(tier: CheckedTier) -> Row:
    report = tier.report.to_json()
    result = Result.PASS if tier.report.admitted else Result.FAIL
    return Row(f"{tier.name} self-test", result, report["sqnr_db"], report["limit_db"], "dB", reason=tier.report.reason)


def _invalid_rows(tier: CheckedTier, budget: AccuracyBudget) -> list[Row]:
    """On the road an invalid frame is no perception, however good its outputs are."""
    if tier.evaluation is None:
        return []  # the self-test row says why
    name, frames = f"{tier.name} share of clean frames not valid", len(tier.evaluation)
    return [limit_gate(name, tier.invalid_share, budget.max_invalid_share, "1", n_samples=frames)]


def prefer(
    tiers: Sequence[CheckedTier], rows: Sequence[Row], times: Mapping[str, Sequence[float]], why_not: str = ""
) -> Preference:
    """Choose the fastest tier that beats FP32 beyond doubt and whose accuracy rows all pass; else FP32.

    `why_not` says why the times are no measurement; then no tier has been shown to be faster.
    """
    earned: list[tuple[str, Speedup]] = []
    refused: list[str] = []
    for tier in tiers:
        if tier.name == REFERENCE:
            continue
        reason = _why_not(tier, rows, times) or why_not
        if reason:
            refused.append(f"{tier.name} is not preferred: {reason}")
        else:
            earned.append((tier.name, speedup(times[REFERENCE], times[tier.name])))
    if earned:
        name, gain = max(earned, key=lambda pair: pair[1].value)
        return Preference(name, f"{name} is preferred: {_times(gain)} as fast as fp32, and within its accuracy budgets")
    if REFERENCE in times:
        return Preference(REFERENCE, "; ".join([*refused, "fp32 serves"]))
    return Preference(next(iter(times), None), "; ".join([*refused, "fp32 was not measured"]))


def _why_not(tier: CheckedTier, rows: Sequence[Row], times: Mapping[str, Sequence[float]]) -> str:
    if tier.name not in times:
        return tier.report.reason
    if REFERENCE not in times:
        return "there is no fp32 to be faster than"
    blocking = [row for row in rows if row.name.startswith(f"{tier.name} ") and row.blocks]
    if blocking:
        return f"{blocking[0].title}: {blocking[0].result.value}, {blocking[0].reason}"
    gain = speedup(times[REFERENCE], times[tier.name])
    return "" if gain.low > 1 else f"it is {_times(gain)} as fast as fp32, not faster beyond doubt"


def _times(gain: Speedup) -> str:
    return f"{gain.value:.2f} [{gain.low:.2f}, {gain.high:.2f}] times"


def resource_rows(
    bundle: Bundle, tier: str | None, times: Mapping[str, Sequence[float]], peaks: Mapping[str, PeakMemory],
    conditions: Conditions, size_mib: float | None, target: TargetBudget,
) -> list[Row]:
    """Return latency and memory rows of the tier that serves, and a size row a model file.

    What was measured while the machine throttled, swapped or changed its mode is "not measured".
    """
    numbers, peak = summary(times.get(tier or "", ())), peaks.get(tier or "", PeakMemory(problem="no tier serves"))
    slow = conditions.against(target.power_mode)
    found = {
        "latency p50": (numbers["p50_ms"], target.p50_ms, "ms", numbers["n"], slow),
        "latency p99": (numbers["p99_ms"], target.p99_ms, "ms", numbers["n"], slow),
        "memory peak": (peak.peak_mib, target.peak_mib, "MiB", None, peak.why_not),
    }
    elsewhere = "" if target.machine in (None, platform.machine()) else (
        f"the target is a {target.machine}, this is a {platform.machine()}")
    rows = []
    for name, (value, limit, unit, runs, why_not) in found.items():
        if limit is None:
            continue
        title, reason = f"{tier or 'no tier'} {name}", elsewhere or why_not
        rows.append(not_measured(title, reason, limit=limit, unit=unit) if reason
                    else limit_gate(title, value, limit, unit, n_samples=runs))
    return rows + _size_rows(bundle, size_mib)


def _size_rows(bundle: Bundle, limit: float | None) -> list[Row]:
    if limit is None:
        return []
    sizes = {variant: bundle.artifact.manifest.files[f"model.{variant}.onnx"].size for variant in bundle.variants}
    return [limit_gate(f"{variant} file size", size / MIB, limit, "MiB") for variant, size in sizes.items()]

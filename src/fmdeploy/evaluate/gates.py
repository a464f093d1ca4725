"""Gates: a measured number against a limit, with three results of which only one passes.

How intervals enter. A gate on an accuracy drop is a non-inferiority test: it passes when the *upper end* of the drop's
two-sided interval is at or below the limit, that is when the data show that the drop is small enough. A point estimate
above the limit fails. In between, the data cannot tell: "not measured", which does not pass either, and the reason says
that more samples would. (Passing on the point estimate alone would wave half of all exactly-at-the-limit regressions
through and reward small test sets.)

Why no correction for many slices. The claim behind a green check is "*every* slice is fine". A bad model is let
through only when its bad slice passes, which happens at most at the error rate of that one test, however many other
slices there are (intersection-union test, Berger 1982, Technometrics 24). Bonferroni guards the opposite claim, "*some*
slice is fine", and would only make good models harder to pass. The price is false alarms in slices with few samples;
that is what `min_slice_samples` is for: a smaller slice is reported as not measured and does not block, unless
`required_slices` names it.

Why a number of groups. An interval from a handful of simulations is too narrow whatever its formula: with 2 to 4 groups
a drop of exactly the limit passes up to 26 % of the time, with 6 about 4 %. Below `min_groups` a point estimate may
still fail, but nothing can pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from fmdeploy.budgets import AccuracyBudget
from fmdeploy.evaluate.bootstrap import Interval, drop
from fmdeploy.evaluate.evaluation import Evaluation

if TYPE_CHECKING:
    from fmdeploy.task import Metric


class Result(str, Enum):
    """Outcome of a gate."""

    PASS = "pass"
    FAIL = "fail"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Row:
    """One gate.

    Attributes:
        name: What was measured, such as `int8-cpu drop vs fp32`.
        result: Outcome.
        value: Measured number; None when not measured.
        limit: What it was held against.
        unit: Unit of value, limit and interval; `1` is a fraction.
        interval: Ends of the confidence interval, where there is one.
        slice: Name of the slice, such as `weather=fog`; None overall.
        n_samples: Samples behind the value.
        required: Whether anything but a pass blocks.
        reason: Why it did not pass; empty when it did.
    """

    name: str
    result: Result
    value: float | None
    limit: float | None
    unit: str
    interval: tuple[float, float] | None = None
    slice: str | None = None
    n_samples: int | None = None
    required: bool = True
    reason: str = ""

    @property
    def blocks(self) -> bool:
        """True when this row alone makes the check fail. A failure always does."""
        return self.result is Result.FAIL or (self.required and self.result is Result.NOT_MEASURED)

    @property
    def title(self) -> str:
        """The name with its slice."""
        return self.name if self.slice is None else f"{self.name} [{self.slice}]"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON without NaN."""
        plain = {**self.__dict__, "result": self.result.value}
        return {**plain, "interval": None if self.interval is None else list(self.interval)}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Row:
        """Inverse of `to_json`."""
        interval = None if raw["interval"] is None else (float(raw["interval"][0]), float(raw["interval"][1]))
        return Row(**{**raw, "result": Result(raw["result"]), "interval": interval})


def gates_pass(rows: Iterable[Row]) -> bool:
    """True when no row blocks and at least one required row passed: an empty check proves nothing."""
    known = tuple(rows)
    proven = any(row.required and row.result is Result.PASS for row in known)
    return proven and not any(row.blocks for row in known)


def not_measured(
    name: str, reason: str, *, limit: float | None, unit: str, part: str | None = None, required: bool = True,
    n_samples: int | None = None,
) -> Row:
    """Return a row for something that could not be measured."""
    return Row(name, Result.NOT_MEASURED, None, limit, unit, None, part, n_samples, required, reason)


def limit_gate(name: str, value: float | None, limit: float, unit: str, *, n_samples: int | None = None) -> Row:
    """Gate a plain number, such as a latency, from above; None and NaN are not measured."""
    if value is None or not math.isfinite(value):
        return not_measured(name, f"the measurement gave {value}", limit=limit, unit=unit, n_samples=n_samples)
    if value > limit:
        return Row(name, Result.FAIL, value, limit, unit, n_samples=n_samples, reason=f"{value:.4g} > {limit:.4g}")
    return Row(name, Result.PASS, value, limit, unit, n_samples=n_samples)


def drop_gate(
    name: str, interval: Interval, limit: float, *, min_samples: int, min_groups: int, part: str | None = None,
    required: bool = True,
) -> Row:
    """Gate an accuracy drop by the non-inferiority rule at the top of this file."""
    if reason := _unfit(interval, limit, min_samples, min_groups):
        return not_measured(name, reason, limit=limit, unit="1", part=part, required=required,
                            n_samples=interval.n_samples)
    result, reason = _judge(interval, limit)
    return Row(name, result, interval.value, limit, "1", (interval.low, interval.high), part, interval.n_samples,
               required, reason)


def _unfit(interval: Interval, limit: float, min_samples: int, min_groups: int) -> str:
    """Why an interval says nothing; empty where it does."""
    if interval.n_samples < min_samples:
        return f"{interval.n_samples} samples, {min_samples} needed"
    if interval.n_groups < min_groups and not interval.value > limit:
        return f"{interval.n_groups} independent groups, {min_groups} needed"
    if not interval.measured:
        return f"the metric is undefined here ({interval.n_samples} samples, {interval.n_groups} groups)"
    return ""


def _judge(interval: Interval, limit: float) -> tuple[Result, str]:
    if interval.value > limit:
        return Result.FAIL, f"drop {interval.value:.4f} > {limit:.4f}"
    if interval.high > limit:
        reason = (f"too few scenes to tell: drop {interval.value:.4f}, but up to {interval.high:.4f} > {limit:.4f} "
                  f"is possible with {interval.n_groups} simulations")
        return Result.NOT_MEASURED, reason
    return Result.PASS, ""


def overall_gate(
    name: str, reference: Evaluation, candidate: Evaluation, metric: Metric, limit: float, budget: AccuracyBudget
) -> Row:
    """Gate the relative drop of `candidate` against `reference` over all samples."""
    interval = drop(reference, candidate, metric, confidence=budget.confidence)
    return drop_gate(name, interval, limit, min_samples=budget.min_samples, min_groups=budget.min_groups)


def slice_gates(
    name: str, reference: Evaluation, candidate: Evaluation, metric: Metric, limit: float, budget: AccuracyBudget
) -> list[Row]:
    """Gate the relative drop in every slice of the budget's axes; one row a slice.

    A required slice or axis that the evaluation does not have gives a row that is not measured. A required axis with
    the label `none` means its one slice of everything else; without that label, each of its slices.
    """
    masks = candidate.masks(axis for axis in budget.slices if axis in candidate.slices)
    required = {slice_name for wanted in budget.required_slices for slice_name in _named_by(wanted, masks)}
    rows = []
    for slice_name, mask in masks.items():
        interval = drop(reference, candidate, metric, mask=mask, confidence=budget.confidence)
        large = interval.n_samples >= budget.min_slice_samples and interval.n_groups >= budget.min_groups
        rows.append(drop_gate(name, interval, limit, min_samples=budget.min_slice_samples,
                              min_groups=budget.min_groups, part=slice_name,
                              required=large or slice_name in required))
    for wanted in budget.required_slices:
        if not _named_by(wanted, masks):
            rows.append(not_measured(name, "the samples have no such slice", limit=limit, unit="1", part=wanted))
    return rows


def _named_by(wanted: str, slices: Iterable[str]) -> list[str]:
    """The slices that `wanted` means: the one of that name, else all values of the axis of that name."""
    known = list(slices)
    return [wanted] if wanted in known else [name for name in known if name.partition("=")[0] == wanted]


def worst_slice(rows: Iterable[Row]) -> Row | None:
    """Return the measured slice row with the largest drop."""
    measured = [row for row in rows if row.slice is not None and row.value is not None]
    return max(measured, key=lambda row: row.value or 0.0, default=None)

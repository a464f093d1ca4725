"""Only a pass passes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fmdeploy.budgets import AccuracyBudget
from fmdeploy.evaluate.bootstrap import Interval
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.evaluate.gates import (
    Result,
    Row,
    drop_gate,
    gates_pass,
    limit_gate,
    not_measured,
    overall_gate,
    slice_gates,
    worst_slice,
)
from support.evaluations import MeanMetric, evaluation


def _interval(value: float, low: float, high: float, samples: int = 1000, groups: int = 50) -> Interval:
    return Interval(value, low, high, samples, groups)


def test_drop_passes_only_when_the_interval_is_below_the_limit() -> None:
    assert drop_gate("d", _interval(0.004, 0.001, 0.007), 0.01, min_samples=100, min_groups=6).result is Result.PASS
    assert drop_gate("d", _interval(0.02, 0.015, 0.025), 0.01, min_samples=100, min_groups=6).result is Result.FAIL


def test_inconclusive_is_not_measured() -> None:
    row = drop_gate("d", _interval(0.008, 0.001, 0.015), 0.01, min_samples=100, min_groups=6)
    assert row.result is Result.NOT_MEASURED
    assert "too few scenes" in row.reason
    assert row.blocks


def test_improvement_passes_a_zero_limit() -> None:
    assert drop_gate("d", _interval(-0.02, -0.03, -0.01), 0.0, min_samples=100, min_groups=6).result is Result.PASS


@pytest.mark.parametrize(
    "interval",
    [
        _interval(0.0, 0.0, 0.0, samples=0),
        _interval(0.001, 0.0, 0.002, samples=99),
        _interval(math.nan, math.nan, math.nan),
        _interval(0.001, math.nan, math.nan),
    ],
    ids=["empty", "tiny", "nan", "nan interval"],
)
def test_empty_tiny_and_nan_are_not_measured(interval: Interval) -> None:
    row = drop_gate("d", interval, 0.01, min_samples=100, min_groups=6)
    assert row.result is Result.NOT_MEASURED
    assert row.reason
    assert not gates_pass([row])


@pytest.mark.parametrize(("value", "result"), [(5.0, Result.PASS), (10.0, Result.PASS), (10.1, Result.FAIL),
                                               (math.nan, Result.NOT_MEASURED), (None, Result.NOT_MEASURED),
                                               (math.inf, Result.NOT_MEASURED)])
def test_limit_gate(value: float | None, result: Result) -> None:
    assert limit_gate("p50", value, 10.0, "ms").result is result


def test_nothing_measured_does_not_pass() -> None:
    assert not gates_pass([])
    optional = not_measured("s", "tiny", limit=0.1, unit="1", required=False)
    assert not gates_pass([optional])
    assert gates_pass([optional, limit_gate("p50", 1.0, 2.0, "ms")])
    assert not gates_pass([not_measured("s", "x", limit=0.1, unit="1"), limit_gate("p50", 1.0, 2.0, "ms")])


def test_failure_blocks_even_where_it_is_not_required() -> None:
    assert Row("d", Result.FAIL, 0.5, 0.1, "1", required=False).blocks


def _budget(**changes: object) -> AccuracyBudget:
    fields = {"metric": "mean", "min_samples": 20, "min_slice_samples": 20, "slices": ("weather", "rare"), **changes}
    return AccuracyBudget.model_validate(fields)


def _pair(fog_drop: float) -> tuple[Evaluation, Evaluation]:
    rng = np.random.default_rng(0)
    weather = np.where(np.arange(120) // 2 % 2, "fog", "clear")
    slices = {"weather": weather, "rare": np.arange(120) < 4}
    before = rng.normal(1, 0.1, size=120)
    after = before - np.where(weather == "fog", fog_drop, 0) + rng.normal(0, 1e-3, size=120)
    return evaluation(before, slices=slices), evaluation(after, slices=slices)


def test_one_bad_slice_fails_although_the_whole_passes() -> None:
    before, after = _pair(0.04)
    overall = overall_gate("d", before, after, MeanMetric(), 0.03, _budget())
    rows = slice_gates("d", before, after, MeanMetric(), 0.03, _budget())
    found = {row.slice: row.result for row in rows}
    assert overall.result is Result.PASS
    assert found == {"weather=fog": Result.FAIL, "weather=clear": Result.PASS, "rare": Result.NOT_MEASURED}
    worst = worst_slice(rows)
    assert worst is not None
    assert worst.slice == "weather=fog"
    assert worst.value == pytest.approx(0.04, abs=0.002)


def test_tiny_slice_blocks_only_when_required() -> None:
    before, after = _pair(0.0)
    rows = slice_gates("d", before, after, MeanMetric(), 0.03, _budget())
    assert gates_pass(rows)
    rows = slice_gates("d", before, after, MeanMetric(), 0.03, _budget(required_slices=("rare",)))
    assert not gates_pass(rows)


def test_required_slice_that_does_not_exist_is_not_measured() -> None:
    before, after = _pair(0.0)
    rows = slice_gates("d", before, after, MeanMetric(), 0.03, _budget(required_slices=("weather=snow",)))
    assert [row.slice for row in rows if row.blocks] == ["weather=snow"]


def test_rows_survive_json() -> None:
    row = drop_gate("d", _interval(0.008, 0.001, 0.015), 0.01, min_samples=100, min_groups=6, part="rare", required=False)
    assert Row.from_json(row.to_json()) == row
    assert row.title == "d [rare]"


def test_false_pass_rate_at_the_limit() -> None:
    """A drop of exactly the limit passes with at most 2.5 % plus chance: non-inferiority, not a coin toss."""
    rng = np.random.default_rng(7)
    passed = 0
    for _ in range(300):
        before = rng.normal(1, 0.1, size=60)
        after = before - 0.03 + rng.normal(0, 0.03, size=60)
        groups = np.arange(60)
        row = overall_gate("d", evaluation(before, groups=groups), evaluation(after, groups=groups), MeanMetric(), 0.03,
                           _budget())
        passed += row.result is Result.PASS
    assert passed / 300 <= 0.06


@pytest.mark.parametrize(("groups", "most"), [(6, 0.06), (8, 0.05)])
def test_false_pass_rate_with_few_groups(groups: int, most: float) -> None:
    """The smallest numbers of simulations that may pass at all keep the promised error rate, nearly."""
    rng = np.random.default_rng(groups)
    passed, cluster = 0, np.repeat(np.arange(groups), 5)
    for _ in range(300):
        before = rng.normal(1, 0.1, size=5 * groups)
        after = before - 0.03 + np.repeat(rng.normal(0, 0.03, size=groups), 5) + rng.normal(0, 0.01, size=5 * groups)
        row = overall_gate("d", evaluation(before, groups=cluster), evaluation(after, groups=cluster), MeanMetric(), 0.03,
                           _budget())
        passed += row.result is Result.PASS
    assert passed / 300 <= most


def test_too_few_groups_cannot_pass_but_can_fail() -> None:
    row = drop_gate("d", _interval(0.001, 0.0, 0.002, groups=5), 0.01, min_samples=100, min_groups=6)
    assert (row.result, row.reason) == (Result.NOT_MEASURED, "5 independent groups, 6 needed")
    assert drop_gate("d", _interval(0.5, 0.4, 0.6, groups=5), 0.01, min_samples=100, min_groups=6).result is Result.FAIL
    assert drop_gate("d", _interval(0.5, math.nan, math.nan, groups=1), 0.01, min_samples=100,
                     min_groups=6).result is Result.NOT_MEASURED
    same = evaluation([1.0] * 100, groups=np.arange(100) % 4)
    assert overall_gate("d", same, same, MeanMetric(), 0.1, _budget()).reason == "4 independent groups, 6 needed"
    assert overall_gate("d", same, same, MeanMetric(), 0.1, _budget(min_groups=4)).result is Result.PASS


def _rare(labels: list[str]) -> Evaluation:
    return evaluation([1.0] * 120, slices={"rare": np.array(labels + ["none"] * (120 - len(labels)))})


def test_a_sample_that_is_not_rare_does_not_stand_for_a_rare_one() -> None:
    """120 samples of which 4 are rare: requiring the axis must not be met by the 116 others."""
    few = _rare(["cut-in", "cut-in", "near-collision", "near-collision"])
    rows = slice_gates("d", few, few, MeanMetric(), 0.03, _budget(slices=("rare",), required_slices=("rare",)))
    assert {row.slice: (row.result, row.required) for row in rows} == {
        "rare": (Result.NOT_MEASURED, True), "rare=cut-in": (Result.NOT_MEASURED, False),
        "rare=near-collision": (Result.NOT_MEASURED, False)}
    assert not gates_pass([*rows, limit_gate("p50", 1.0, 2.0, "ms")])
    none = _rare([])
    rows = slice_gates("d", none, none, MeanMetric(), 0.03, _budget(slices=("rare",), required_slices=("rare",)))
    assert [(row.slice, row.reason) for row in rows] == [("rare", "0 samples, 20 needed")]
    many = _rare(["cut-in", "near-collision"] * 20)
    rows = slice_gates("d", many, many, MeanMetric(), 0.03, _budget(slices=("rare",), required_slices=("rare",)))
    assert gates_pass(rows)
    assert next(row for row in rows if row.slice == "rare").n_samples == 40


def test_a_required_axis_without_none_needs_each_of_its_slices() -> None:
    before, after = _pair(0.0)
    rows = slice_gates("d", before, after, MeanMetric(), 0.03, _budget(required_slices=("weather",), min_slice_samples=70))
    assert {row.slice for row in rows if row.blocks} == {"weather=clear", "weather=fog"}

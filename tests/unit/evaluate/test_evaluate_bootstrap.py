"""Intervals cover, pairing helps, clusters count, and nothing undefined looks measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats  # type: ignore[import-untyped]

from fmdeploy.errors import DataError
from fmdeploy.evaluate.bootstrap import drop, estimate, group_sums, student_quantile
from support.evaluations import MeanMetric, evaluation


def test_value_is_the_relative_difference() -> None:
    before, after = evaluation([0.8] * 20), evaluation([0.6] * 20)
    found = drop(before, after, MeanMetric())
    assert found.value == pytest.approx(0.25)
    assert [found.low, found.high] == pytest.approx([0.25, 0.25])
    assert (found.n_samples, found.n_groups) == (20, 10)
    assert drop(before, after, MeanMetric(), relative=False).value == pytest.approx(0.2)


def test_sign_follows_the_metric() -> None:
    before, after = evaluation([0.1] * 8), evaluation([0.2] * 8)
    assert drop(before, after, MeanMetric(higher_is_better=False)).value == pytest.approx(1.0)


def test_coverage_of_a_cluster_mean() -> None:
    """95 % intervals must hold the truth about 95 % of the time although samples of a group are equal."""
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(400):
        per_group = rng.normal(1.0, 0.3, size=24)
        found = estimate(evaluation(np.repeat(per_group, 5), groups=np.repeat(np.arange(24), 5)), MeanMetric(),
                         draws=500, seed=trial)
        hits += found.low <= 1.0 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_coverage_with_few_groups() -> None:
    """The plain percentile interval covers about 85 % with 6 groups; the widened one must not fall that low."""
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(400):
        found = estimate(evaluation(rng.normal(1.0, 0.3, size=6), groups=np.arange(6)), MeanMetric(), draws=500, seed=trial)
        hits += found.low <= 1.0 <= found.high
    assert hits / 400 >= 0.90


def test_ignoring_clusters_would_be_too_sure() -> None:
    values = np.repeat(np.random.default_rng(3).normal(1, 0.3, size=12), 10)
    clustered = estimate(evaluation(values, groups=np.repeat(np.arange(12), 10)), MeanMetric())
    naive = estimate(evaluation(values, groups=np.arange(120)), MeanMetric())
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)


def test_pairing_cancels_hard_scenes() -> None:
    rng = np.random.default_rng(4)
    scene = rng.normal(1.0, 0.3, size=60)
    before, after = evaluation(scene), evaluation(scene - 0.02 + rng.normal(0, 0.002, size=60))
    paired = drop(before, after, MeanMetric(), relative=False)
    alone = estimate(before, MeanMetric())
    assert paired.low > 0.015
    assert paired.high < 0.025
    assert alone.high - alone.low > 0.1


def test_same_seed_same_interval() -> None:
    before, after = evaluation(np.linspace(0.5, 1, 40)), evaluation(np.linspace(0.4, 1, 40))
    assert drop(before, after, MeanMetric(), seed=5) == drop(before, after, MeanMetric(), seed=5)
    assert drop(before, after, MeanMetric(), seed=5) != drop(before, after, MeanMetric(), seed=6)


def test_mask_selects_samples() -> None:
    before = evaluation([1.0] * 20)
    after = evaluation([1.0] * 10 + [0.5] * 10)
    mask = np.arange(20) >= 10
    assert drop(before, after, MeanMetric(), mask=mask).value == pytest.approx(0.5)
    assert drop(before, after, MeanMetric(), mask=~mask).value == 0


@pytest.mark.parametrize(
    ("values", "mask"),
    [
        ([1.0] * 8, np.zeros(8, bool)),  # no sample
        ([math.nan] * 8, None),  # a broken model
        ([0.0] * 8, None),  # a reference of zero has no relative drop
        ([1.0] * 8, np.arange(8) < 2),  # one group: nothing to resample
    ],
)
def test_undefined_is_not_measured(values: list[float], mask: np.ndarray | None) -> None:
    assert not drop(evaluation(values), evaluation([0.5] * 8), MeanMetric(), mask=mask).measured


def test_different_samples_are_refused() -> None:
    before = evaluation([1.0] * 8)
    with pytest.raises(DataError, match="different samples"):
        drop(before, evaluation([1.0] * 6), MeanMetric())
    with pytest.raises(DataError, match="different data"):
        drop(before, evaluation([1.0] * 8, data="other:test"), MeanMetric())


def test_group_sums() -> None:
    rows = np.array([[1.0, 2], [3, 4], [5, 6]])
    assert group_sums(rows, np.array([7, 2, 7])).tolist() == [[3, 4], [6, 8]]


@pytest.mark.parametrize("freedom", [4, 8, 30, 200])
@pytest.mark.parametrize("probability", [0.025, 0.05, 0.975])
def test_student_quantile_agrees_with_scipy(freedom: int, probability: float) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(scipy_stats.t.ppf(probability, freedom), rel=0.01)

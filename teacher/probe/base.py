"""What a rung of the probe ladder is, what it may look at, and what it says.

A rung measures one thing about one network. Most train a small probe on frozen features of the train split, choose its
hyper-parameters on val and judge it on test: those are `StatisticsRung`s, which get their interval and their comparison
with the same architecture at random initialisation for nothing. Others implement `Rung.measure` themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from fmdeploy.artifact import Artifact
from fmdeploy.evaluate.bootstrap import Interval, drop, estimate
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.strictjson import finite_or_none
from fmdeploy.task import Metric
from fmdeploy.teacher.probe.subject import FeatureMaps, Subject
from fmdeploy.teacher.probe.view import NotMeasuredError, View

__all__ = ["Bench", "FeatureMaps", "NotMeasuredError", "Result", "Rung", "StatisticsRung", "Subject", "View"]


@dataclass(frozen=True)
class Bench:
    """All that a rung may look at.

    Attributes:
        view: The network under test.
        random: The same architecture at random initialisation; None where there is none or it was left out.
        check: CHECK of a bundle, for the deployment rungs.
        seed: Of every random choice of a probe.
        few_shot_steps: Optimiser steps of the few-shot rungs.
    """

    view: View
    random: View | None = None
    check: Artifact | None = None
    seed: int = 0
    few_shot_steps: int = 100


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        metric: What `interval` is.
        interval: Value and ends; None where it was not measured.
        unit: Of the value; `1` for fractions of one.
        higher_is_better: True for scores, False for errors.
        baseline: The same number of the network at random initialisation.
        gain: By how much the network is better than that, paired; above zero is better whatever the metric.
        also: Further numbers of the same probe.
        chosen: Hyper-parameters, as chosen on val.
        reason: Why it was not measured.
    """

    metric: str
    interval: Interval | None = None
    unit: str = "1"
    higher_is_better: bool = True
    baseline: Interval | None = None
    gain: Interval | None = None
    also: Mapping[str, Interval] = field(default_factory=dict)
    chosen: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""

    @property
    def measured(self) -> bool:
        """Whether there is a finite value."""
        return self.interval is not None and finite_or_none(self.interval.value) is not None

    def to_json(self) -> dict[str, Any]:
        """Row of `probe.json`: `value`, `low` and `high` are null and `reason` says why where it was not measured."""
        found = self.interval
        result = "measured" if self.measured else "not measured"
        return {
            "metric": self.metric, **ends(found), "result": result, "unit": self.unit,
            "higher_is_better": self.higher_is_better, "n": found.n_samples if found else 0,
            "groups": found.n_groups if found else 0, "baseline": self.baseline and ends(self.baseline),
            "gain": self.gain and ends(self.gain), "also": {name: ends(each) for name, each in self.also.items()},
            "chosen": dict(self.chosen), "reason": self.reason,
        }


def ends(interval: Interval | None) -> dict[str, float | None]:
    """Value, low and high of an interval as JSON; null where undefined."""
    if interval is None:
        return {"value": None, "low": None, "high": None}
    return {name: finite_or_none(getattr(interval, name)) for name in ("value", "low", "high")}


class Rung(ABC):
    """One measurement; it has no state.

    Attributes:
        name: As in `--rungs NAME`, and the key of its row.
        metric_name: What its number is, printed also where it is not measured.
        unit: Of its number.
        higher_is_better: True for scores, False for errors.
        optional: True leaves it out unless `--rungs` names it (it takes long).
    """

    name: ClassVar[str]
    metric_name: ClassVar[str]
    unit: ClassVar[str] = "1"
    higher_is_better: ClassVar[bool] = True
    optional: ClassVar[bool] = False

    @abstractmethod
    def measure(self, bench: Bench) -> Result:
        """The row of this rung.

        Raises:
            NotMeasuredError: it cannot be measured here; its text becomes the row's reason.
        """

    def refused(self, reason: str) -> Result:
        """The row that says why there is no number."""
        return Result(self.metric_name, None, self.unit, self.higher_is_better, reason=reason)


@dataclass(frozen=True)
class Judged:
    """What a `StatisticsRung` found for one network.

    Attributes:
        evaluation: Statistics of the row's metric.
        also: Name → further metric and its statistics.
        chosen: Hyper-parameters, as chosen on val.
        metric: Where it depends on the task; default: that of the rung.
    """

    evaluation: Evaluation
    also: Mapping[str, tuple[Metric, Evaluation]] = field(default_factory=dict)
    chosen: Mapping[str, Any] = field(default_factory=dict)
    metric: Metric | None = None


class StatisticsRung(Rung):
    """A rung whose number is a function of sums over test samples: intervals and the paired gain come from them.

    Attributes:
        compared: Whether the same architecture at random initialisation is measured beside it.
    """

    compared: ClassVar[bool] = True

    def metric(self) -> Metric:
        """The row's metric; its name is the key of its statistics in the evaluation."""
        raise NotImplementedError(f"{self.name} names its metric in what it judged")

    @abstractmethod
    def judge(self, view: View, bench: Bench) -> Judged:
        """Per-sample statistics of one network on test samples: make them with `View.evaluation`.

        Args:
            view: The network under test, or the random one: treat both alike.
            bench: For its seed and options.

        Raises:
            NotMeasuredError: it cannot be measured here.
        """

    def measure(self, bench: Bench) -> Result:
        """Judge the network, and the random one beside it."""
        judged = self.judge(bench.view, bench)
        metric = judged.metric or self.metric()
        row = Result(
            judged.metric.name if judged.metric else self.metric_name,
            estimate(judged.evaluation, metric, seed=bench.seed), self.unit, metric.higher_is_better,
            also={name: estimate(each, other, seed=bench.seed) for name, (other, each) in judged.also.items()},
            chosen=judged.chosen,
        )
        if not row.measured:
            return replace(self.refused("the metric is undefined on the test samples"), chosen=judged.chosen)
        if bench.random is None or not self.compared:
            return row
        reference = self.judge(bench.random, bench).evaluation
        return replace(row, baseline=estimate(reference, metric, seed=bench.seed),
                       gain=gain(reference, judged.evaluation, metric, seed=bench.seed))


def gain(reference: Evaluation, candidate: Evaluation, metric: Metric, *, seed: int = 0) -> Interval:
    """By how much `candidate` is better than `reference` on the same samples, in units of the metric."""
    loss = drop(reference, candidate, metric, relative=False, seed=seed)
    return Interval(0.0 - loss.value, 0.0 - loss.high, 0.0 - loss.low, loss.n_samples, loss.n_groups)

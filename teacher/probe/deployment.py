"""Deployment rungs: what a CHECK measured of the bundle that was made from this network. Nothing is timed here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from fmdeploy.artifact import Artifact
from fmdeploy.evaluate.bootstrap import Interval, drop
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.manifest import Parent
from fmdeploy.teacher.probe.base import Bench, NotMeasuredError, Result, Rung

CONTENT = "check.json"
REFERENCE = "fp32"
INT8 = ("int8-cpu", "int8")


class FromCheck(Rung):
    """A number that a CHECK holds, of the tier that would serve."""

    higher_is_better = False

    def measure(self, bench: Bench) -> Result:
        """The row; one measurement of one machine has no interval over simulations."""
        found = content_of(bench)
        tier = (found.get("preferred") or {}).get("tier")
        if tier is None:
            raise NotMeasuredError("no tier serves there")
        if why := self.spoilt(found):
            raise NotMeasuredError(why)
        value, count = self.read(found, tier)
        if value is None:
            raise NotMeasuredError(f"the CHECK has no such number of the tier {tier}")
        point = Interval(float(value), math.nan, math.nan, count, 0)
        return Result(self.metric_name, point, self.unit, self.higher_is_better, chosen={"tier": tier})

    def spoilt(self, found: Mapping[str, Any]) -> str:
        """Why the conditions of the check make this no measurement; empty where they do not."""
        conditions = found.get("conditions") or {}
        reasons = [*conditions.get("tainted", ()), *conditions.get("unknown", ())]
        return f"the check was no measurement: {reasons[0]}" if reasons else ""

    def read(self, found: Mapping[str, Any], tier: str) -> tuple[float | None, int]:
        """Value and number of runs behind it."""
        raise NotImplementedError


class LatencyMedian(FromCheck):
    """Median time of one inference."""

    name = "latency-p50"
    metric_name = "latency p50"
    unit = "ms"
    key: ClassVar[str] = "p50_ms"

    def read(self, found: Mapping[str, Any], tier: str) -> tuple[float | None, int]:
        """See `FromCheck.read`."""
        row = found.get("latency", {}).get(tier, {})
        return row.get(self.key), int(row.get("n", 0))


class LatencyTail(LatencyMedian):
    """99th percentile of the time of one inference."""

    name = "latency-p99"
    metric_name = "latency p99"
    key = "p99_ms"


class Memory(FromCheck):
    """Peak memory of the process that serves."""

    name = "memory"
    metric_name = "peak memory"
    unit = "MiB"

    def spoilt(self, found: Mapping[str, Any]) -> str:
        """A warm board uses as much memory as a cold one."""
        return ""

    def read(self, found: Mapping[str, Any], tier: str) -> tuple[float | None, int]:
        """See `FromCheck.read`."""
        return found.get("peak_mib", {}).get(tier), 1


class Int8Drop(Rung):
    """Relative loss of the primary metric from FP32 to INT8, as the runtime ran both; paired, so it has an interval."""

    name = "int8-drop"
    metric_name = "relative drop"
    higher_is_better = False

    def measure(self, bench: Bench) -> Result:
        """See `Rung.measure`."""
        found, check = content_of(bench), bench.check
        assert check is not None
        tier = next((name for name in INT8 if check.has(f"evaluation.{name}.json")), None)
        if tier is None or not check.has(f"evaluation.{REFERENCE}.json"):
            raise NotMeasuredError("the CHECK has no evaluation of both FP32 and INT8")
        before, after = (Evaluation.load(check, f"evaluation.{name}") for name in (REFERENCE, tier))
        metric = next(m for m in bench.view.subject.task.metrics() if m.name == found["metric"])
        return Result(self.metric_name, drop(before, after, metric, seed=bench.seed), higher_is_better=False,
                      chosen={"tier": tier, "metric": metric.name})


def content_of(bench: Bench) -> dict[str, Any]:
    """What the CHECK says.

    Raises:
        NotMeasuredError: there is none, or it is of a bundle that this network is no part of.
    """
    check, own = bench.check, bench.view.subject.artifact
    if check is None:
        raise NotMeasuredError("no CHECK was given: --check CHECK")
    if not check.has(CONTENT) or check.manifest.stage != "check":
        raise NotMeasuredError("the CHECK was not written by check")
    if own is None or own.digest not in set(_lineage(check)):
        raise NotMeasuredError("the CHECK is of a bundle that was not made from this model")
    found: dict[str, Any] = check.json(CONTENT)
    return found


def _lineage(artifact: Artifact) -> Iterator[str]:
    def walk(parents: Mapping[str, Parent]) -> Iterator[str]:
        for parent in parents.values():
            yield parent.digest
            yield from walk(parent.inputs)

    return walk(artifact.inputs)

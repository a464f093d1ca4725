"""Canaries: rare safety cases that a candidate may not lose, not one, whatever its average.

A canary file is JSON: {"metric", "floor", "cases": [sample names], "data"}. A case is solved when the metric of that
one sample is at least `floor` (at most, for errors). A case that was solved and is not any more blocks, unless it is
accepted by name and with a reason, which both go into the manifest of the CHECK and so into the lineage. `data` binds
the names to their content, `<dataset digest>:<split>`: simulations of one seed have one name in every dataset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fmdeploy import strictjson
from fmdeploy.command import Outcome, command
from fmdeploy.compare.judged import Judged
from fmdeploy.config import InputPath, OutputPath, Positional, StageConfig, validate
from fmdeploy.data.format import open_dataset
from fmdeploy.errors import ConfigError, DataError
from fmdeploy.evaluate.evaluation import NO_SLICE, Evaluation, data_key
from fmdeploy.evaluate.gates import Result, Row
from fmdeploy.files import write_atomically
from fmdeploy.task import Metric, load_task

NAME = "canary cases lost"


class CanarySet(BaseModel):
    """The content of a canary file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    metric: str
    floor: float
    cases: tuple[str, ...] = Field(min_length=1)
    data: str | None = None
    """Of which split of which dataset the cases are, as in `Evaluation.data`; None: of whichever has them."""


def read_canaries(path: Path) -> CanarySet:
    """Read a canary file.

    Raises:
        DataError: it is not strict JSON.
        ConfigError: keys or values are wrong, or a case is named twice.
    """
    try:
        content = strictjson.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"is not JSON: {error}", where=path) from error
    if not isinstance(content, dict):
        raise DataError("is not a canary set", where=path, expected='{"metric", "floor", "cases"}')
    found = validate(CanarySet, content, where=path)
    if len(set(found.cases)) != len(found.cases):
        raise ConfigError("names a case twice", where=path)
    return found


@dataclass(frozen=True)
class Case:
    """One canary: its scores before and after, NaN where the metric says nothing about it."""

    name: str
    old: float
    new: float
    was_solved: bool
    is_solved: bool

    @property
    def lost(self) -> bool:
        """Solved before, not any more."""
        return self.was_solved and not self.is_solved

    def to_json(self) -> dict[str, Any]:
        """For a machine."""
        old, new = (score if math.isfinite(score) else None for score in (self.old, self.new))
        return {"case": self.name, "old": old, "new": new, "was_solved": self.was_solved, "is_solved": self.is_solved}


def judge_cases(canaries: CanarySet, candidate: Judged, deployed: Judged) -> list[Case]:
    """Score every canary on both sides.

    Raises:
        DataError: a case is not among the evaluated samples, or among those of several domains.
        ConfigError: the task has no such metric.
    """
    metric = next((m for m in candidate.task.metrics() if m.name == canaries.metric), None)
    if metric is None:
        raise ConfigError("the task has no such metric", where=f"canary metric {canaries.metric!r}",
                          expected=", ".join(m.name for m in candidate.task.metrics()))
    found, rows = [], _rows(canaries, candidate)
    for name in canaries.cases:
        domain, row = _place(name, rows)
        old, new = (_score(side.evaluations[domain], metric, row) for side in (deployed, candidate))
        found.append(Case(name, old, new, *(_solved(score, metric, canaries.floor) for score in (old, new))))
    return found


def _rows(canaries: CanarySet, side: Judged) -> dict[str, dict[str, int]]:
    """Domain → sample → its row, of the domains that the canaries may be of."""
    held = {domain: evaluation for domain, evaluation in side.evaluations.items()
            if canaries.data in (None, evaluation.data)}
    if not held:
        raise DataError("the canaries are of other data than is compared", where="canary", expected=canaries.data,
                        found=", ".join(evaluation.data for evaluation in side.evaluations.values()),
                        fix="Compare on that split too, or choose them anew: fmdeploy data canary")
    return {domain: {name: row for row, name in enumerate(evaluation.ids)} for domain, evaluation in held.items()}


def _place(name: str, rows: Mapping[str, Mapping[str, int]]) -> tuple[str, int]:
    """Domain and row of a case."""
    domains = [domain for domain, row_of in rows.items() if name in row_of]
    if not domains:
        raise DataError(f"the canary {name} is not among the evaluated samples", where="canary",
                        fix="Name samples of the split that is compared")
    if len(domains) > 1:
        raise DataError(f"the canary {name} is a sample of several domains", where="canary", found=", ".join(domains),
                        fix='Say of which: "data": "<dataset digest>:<split>"')
    return domains[0], rows[domains[0]][name]


def _score(evaluation: Evaluation, metric: Metric, row: int) -> float:
    if metric.name not in evaluation.stats:
        raise DataError("the metric of the canaries was not evaluated", where="canary", expected=metric.name,
                        found=", ".join(evaluation.stats))
    return float(metric.value(evaluation.stats[metric.name][row]))


def _solved(score: float, metric: Metric, floor: float) -> bool:
    return score >= floor if metric.higher_is_better else score <= floor


def canary_row(cases: list[Case], accepted: Mapping[str, str]) -> Row:
    """The gate: no case may be lost but those that are accepted.

    Args:
        cases: From `judge_cases`.
        accepted: Case → why it may be lost.

    Raises:
        ConfigError: a case is accepted that was not lost: the override is stale.
    """
    lost = {case.name: case for case in cases if case.lost}
    if stale := sorted(set(accepted) - set(lost)):
        raise ConfigError("is accepted as lost, but is not", where=f"accept {stale[0]!r}",
                          found=", ".join(sorted(lost)) or "none is lost", fix="Leave it out")
    blamed = [name for name in lost if name not in accepted]
    solved = sum(case.was_solved for case in cases)
    if not solved:
        return Row(NAME, Result.NOT_MEASURED, None, 0.0, "cases", n_samples=len(cases),
                   reason="the deployed model solves none of them: choose another floor or other cases")
    shown = "; ".join(f"{name}: {lost[name].old:.3f} -> {lost[name].new:.3f}" for name in blamed[:5])
    note = f"; accepted: {', '.join(sorted(accepted))}" if accepted else ""
    reason = f"of {solved} that were solved: {shown}{note}" if blamed or note else ""
    return Row(NAME, Result.FAIL if blamed else Result.PASS, float(len(blamed)), 0.0, "cases", n_samples=solved,
               reason=reason)


class CanaryConfig(StageConfig):
    """Which cases become canaries."""

    data: Annotated[InputPath, Positional()] = Field(description="DATASET")
    out: OutputPath = Field(description="The canary file to write (JSON)")
    task: str = Field(default="bev-occupancy", description="built-in task, or module:Class")
    split: str = Field(default="test", description="held-out split to choose from")
    axis: str = Field(default="rare", description="slice axis whose labels are the rare cases")
    per_label: int = Field(default=20, ge=1, description="cases of each label, evenly spaced over the recordings")
    metric: str | None = Field(default=None, description="metric of a case; default: the task's primary one")
    floor: float = Field(default=0.25, description="a case is solved when its metric is at least this")


@command(CanaryConfig)
def canary(config: CanaryConfig) -> Outcome:
    """Choose rare safety cases of a held-out split as canaries for `compare --canary`.

    Raises:
        ConfigError: the task has no such slice or metric.
        DataError: the split has no rare case.
    """
    task, data = load_task(config.task), open_dataset(config.data)
    samples = task.samples(data, config.split)
    if config.axis not in samples.slices:
        raise ConfigError("the samples have no such slice axis", where=f"axis {config.axis!r}",
                          expected=", ".join(samples.slices))
    metric = config.metric or task.metrics()[0].name
    if metric not in {each.name for each in task.metrics()}:
        raise ConfigError("the task has no such metric", where=f"metric {metric!r}")
    label_N = np.asarray(samples.slices[config.axis]).astype(np.str_)
    labels = [label for label in np.unique(label_N) if label not in (NO_SLICE, "False")]
    chosen = [row for label in labels for row in _spaced(np.flatnonzero(label_N == label), config.per_label)]
    if not chosen:
        raise DataError(f"no sample of {config.split!r} is a rare case", where=config.data, expected=config.axis)
    found = {"metric": metric, "floor": config.floor, "cases": [samples.ids[row] for row in chosen],
             "data": data_key(data.digest, config.split)}
    write_atomically(config.out, json.dumps(found, indent=1) + "\n")
    return Outcome((f"{len(chosen)} canaries ({', '.join(labels)}) at {config.out}",), found)


def _spaced(rows: Any, count: int) -> list[int]:
    return [int(rows[k]) for k in np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))]

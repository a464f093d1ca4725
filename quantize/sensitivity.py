"""Which layers INT8 hurts: every group quantised alone, and every group left out alone, against the float network.

    leave-one-in    only this group is quantised: the noise that it brings
    leave-one-out   all but this group are quantised: what keeping it in float would win

Both are measured by switching the quantizers of one calibrated module, on samples of the validation split: SQNR of
every output, and how far the task's primary metric drops, with its paired interval. The test split is never looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fmdeploy.data.format import Dataset
from fmdeploy.errors import DataError
from fmdeploy.evaluate.bootstrap import Interval, drop
from fmdeploy.evaluate.evaluation import Evaluation, Predict, evaluate
from fmdeploy.evaluate.sqnr import finite_db, sqnr_db
from fmdeploy.models.outputs import predictor
from fmdeploy.progress import progress
from fmdeploy.quantize.groups import Switchboard
from fmdeploy.subset import Subset, subset
from fmdeploy.task import Arrays, Samples, Task

SPLIT = "val"
BATCH = 16
FORMAT = 1


@dataclass(frozen=True)
class Effect:
    """What a choice of quantised groups does to the network.

    Attributes:
        sqnr_db: Output → dB against the float network; 999 where nothing changed.
        drop: Relative drop of the primary metric; None where it is undefined.
        low: Lower end of its paired 95 % interval; None with too few recordings.
        high: Upper end.
    """

    sqnr_db: dict[str, float]
    drop: float | None
    low: float | None
    high: float | None

    @property
    def worst_db(self) -> float:
        """SQNR of the output that suffers most."""
        return min(self.sqnr_db.values())


class Judge:
    """What choices of quantised groups do: noise against the same weights in float, drop against the float student.

    The two references are one network after PTQ. After training on the grid the weights differ from the student's.

    Args:
        board: Of the calibrated module.
        task: Names the outputs and the metric.
        samples: To judge on.
        student: The float student.
    """

    def __init__(self, board: Switchboard, task: Task, samples: Samples, student: Predict) -> None:
        self.board, self.task, self.samples = board, task, samples
        self.metric = task.metrics()[0]
        self._student = evaluate(student, samples, (self.metric,), batch_size=BATCH)
        self._float, _ = self._run(())

    def effect(self, chosen: Collection[str]) -> Effect:
        """The effect of quantising the groups `chosen` and nothing else; see `Switchboard.only`."""
        outputs, score = self._run(chosen)
        ratios = {name: finite_db(sqnr_db(wanted, outputs[name])) for name, wanted in self._float.items()}
        return Effect(ratios, *_numbers(drop(self._student, score, self.metric)))

    def _run(self, chosen: Collection[str]) -> tuple[Arrays, Evaluation]:
        predict = predictor(self.board.module, self.task.io)
        kept: list[Arrays] = []

        def remember(inputs: Arrays) -> Arrays:
            kept.append(predict(inputs))
            return kept[-1]

        with self.board.only(chosen):
            score = evaluate(remember, self.samples, (self.metric,), batch_size=BATCH)
        return {name: np.concatenate([part[name] for part in kept]) for name in kept[0]}, score


def validation_samples(task: Task, data: Dataset, count: int) -> Subset:
    """At most `count` samples of the validation split, evenly spaced.

    Raises:
        DataError: the dataset has no validation split.
    """
    if not data.splits.get(SPLIT):
        raise DataError("has no validation split to judge on: the test split is for the end", where=data.artifact.root,
                        expected=SPLIT, found=", ".join(data.splits))
    return subset(task.samples(data, SPLIT), count)


def _numbers(interval: Interval) -> tuple[float | None, float | None, float | None]:
    value, low, high = (v if np.isfinite(v) else None for v in (interval.value, interval.low, interval.high))
    return value, low, high


@dataclass(frozen=True)
class SensitivityRow:
    """One group: what it does alone, and what is left without it."""

    name: str
    kind: str
    alone: Effect
    without: Effect


@dataclass(frozen=True)
class Sensitivity:
    """The whole table, `sensitivity.json`.

    Attributes:
        metric: The primary metric, whose relative drop is meant.
        samples: How many samples of the validation split.
        everything: All groups quantised.
        rows: In the order of the network.
    """

    metric: str
    samples: int
    everything: Effect
    rows: tuple[SensitivityRow, ...]

    def by_noise(self) -> list[SensitivityRow]:
        """Rows, the one that brings the most noise first."""
        return sorted(self.rows, key=lambda row: row.alone.worst_db)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"format": FORMAT, "split": SPLIT, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Sensitivity:
        """Read back what `to_json` gave."""
        rows = tuple(SensitivityRow(r["name"], r["kind"], Effect(**r["alone"]), Effect(**r["without"]))
                     for r in values["rows"])
        return cls(values["metric"], values["samples"], Effect(**values["everything"]), rows)


def measure_sensitivity(judge: Judge) -> Sensitivity:
    """Quantise every group alone, and leave every group out alone."""
    groups, names = judge.board.groups, judge.board.names
    everything = judge.effect(names)
    rows = []
    with progress("sensitivity", total=2 * len(groups)) as bar:
        for group in groups:
            alone = judge.effect((group.name,))
            bar.advance(1)
            without = judge.effect([name for name in names if name != group.name])
            bar.advance(1)
            rows.append(SensitivityRow(group.name, group.kind, alone, without))
    return Sensitivity(judge.metric.name, len(judge.samples), everything, tuple(rows))

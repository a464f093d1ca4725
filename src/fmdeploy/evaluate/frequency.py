"""How often a model says that something happens, against how often it does: what oversampling spoils first.

On the natural distribution (a held-out split as it was recorded) the mean predicted probability of an event should be
its frequency, "calibration in the large" (Steyerberg 2010, section 2). Together with the expected calibration error it
guards mixtures: a model that saw rare cases too often expects them too often.

Legend: B samples of a batch, H W cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fmdeploy.evaluate.bootstrap import Interval, estimate
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.evaluate.metrics import Array, Arrays, Metric, sigmoid, softmax, target_of
from fmdeploy.strictjson import finite_or_none
from fmdeploy.task import Metric as AnyMetric

TOLERANCE = 0.25  # of the ratio, both ways: 0.8 .. 1.25
MIN_GROUPS = 6


@dataclass
class Frequency(Metric):
    """Mean predicted probability of one event over its observed frequency; 1 is right.

    Attributes:
        channel: Of a dense output (B, C, H, W): each cell is one event; of a class output (B, C): each sample.
    """

    channel: int = 0
    higher_is_better: bool = field(default=False, init=False)

    def statistics(self, outputs: Arrays, targets: Arrays) -> Array:
        """Return (B, 3): summed probability, events that happened, chances to happen; unknown classes have none."""
        logits, labels = np.asarray(outputs[self.output], np.float32), np.asarray(target_of(targets, self.target))
        if logits.ndim == 2:
            label_B = labels.astype(np.int64)
            known = label_B >= 0
            chance, truth = softmax(logits)[:, self.channel], label_B == self.channel
            return np.stack([np.where(known, chance, 0), truth & known, known], axis=1).astype(np.float64)
        chance, truth = sigmoid(logits[:, self.channel]), labels[:, self.channel] != 0
        cells = np.full(len(chance), float(np.prod(chance.shape[1:])))
        flat = [each.reshape(len(chance), -1).sum(axis=1, dtype=np.float64) for each in (chance, truth)]
        return np.stack([*flat, cells], axis=1)

    def value(self, total: Array) -> Array:
        """Return predicted / observed; NaN for an event that never happened."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(total[..., 1] > 0, total[..., 0] / total[..., 1], np.nan))


def frequencies(output: str, target: str, names: Sequence[str]) -> tuple[Frequency, ...]:
    """One metric for each channel or class of an output, called `frequency:<name>`."""
    return tuple(Frequency(f"frequency:{name}", output, target, channel=k) for k, name in enumerate(names))


def calibration_guard(
    evaluation: Evaluation, errors: Sequence[AnyMetric], events: Sequence[AnyMetric]
) -> dict[str, Any]:
    """ECE and event frequencies of an evaluation on the natural distribution.

    Args:
        evaluation: With the statistics of all these metrics.
        errors: Calibration errors.
        events: From `frequencies`.

    Returns:
        `errors` and `events`, each name → {value, low, high}; of an event also `predicted` and `observed` frequency and
        `trusted`: whether the interval of the ratio lies within 0.8 .. 1.25 (`None`: not measured). `guard`: pass, fail
        or not measured; fail as soon as one interval lies outside.
    """
    found = {event.name.partition(":")[2]: _event(evaluation, event) for event in events}
    return {
        "errors": {error.name: _spread(estimate(evaluation, error)) for error in errors},
        "events": found, "guard": _verdict(found),
    }


def _event(evaluation: Evaluation, event: AnyMetric) -> dict[str, Any]:
    predicted, observed, chances = (float(x) for x in evaluation.total(event))
    interval = estimate(evaluation, event)
    return {**_spread(interval), "predicted": finite_or_none(predicted / chances) if chances else None,
            "observed": observed / chances if chances else None, "trusted": _trusted(interval)}


def _trusted(ratio: Interval) -> bool | None:
    low, high = 1 / (1 + TOLERANCE), 1 + TOLERANCE
    if not ratio.measured or ratio.n_groups < MIN_GROUPS:
        return None
    if low <= ratio.low and ratio.high <= high:
        return True
    return False if ratio.high < low or ratio.low > high else None


def _verdict(found: Mapping[str, Mapping[str, Any]]) -> str:
    said = [event["trusted"] for event in found.values()]
    if any(each is False for each in said):
        return "fail"
    return "pass" if said and all(said) else "not measured"


def _spread(interval: Interval) -> dict[str, float | None]:
    return {"value": finite_or_none(interval.value), "low": finite_or_none(interval.low),
            "high": finite_or_none(interval.high)}

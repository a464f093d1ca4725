"""Sections on accuracy: headline comparisons, output channels (horizons), slices, reliability."""

# K statistics of a sample

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmdeploy.evaluate.bootstrap import Interval, drop, estimate
from fmdeploy.evaluate.evaluation import Mask
from fmdeploy.evaluate.metrics import Array
from fmdeploy.evaluate.plots.accuracy import Curve, plot_channels, plot_slices
from fmdeploy.evaluate.plots.calibration import Bins, plot_reliability
from fmdeploy.evaluate.plots.figure import Picture
from fmdeploy.evaluate.report.sources import BASELINE, Model, Sources, require_evaluation
from fmdeploy.task import Metric

COMPARED = ("teacher", "student", "int8", "scratch", "other")
# What is compared: reference, candidate, and whether the loss is relative to the reference.
CLAIMS = {
    "retention": ("teacher", "student", True),
    "int8": ("student", "int8", True),
    "distillation": ("scratch", "student", False),
    "trivial": (BASELINE, "student", False),
}
NO_EVALUATIONS = "none of the given artifacts carries an evaluation"


@dataclass(frozen=True)
class Comparison:
    """How a candidate stands against a reference; positive means it lost. `kind` is one of the keys of CLAIMS."""

    kind: str
    interval: Interval
    reference: str


@dataclass
class ChannelMetric:
    """One output channel of a metric that keeps its channels apart (`per_channel`)."""

    name: str
    channel: int
    per_channel: Callable[[Array], Array]
    higher_is_better: bool = True

    def statistics(self, outputs: Any, targets: Any) -> Array:
        """Not needed: the statistics are those of the metric itself."""
        raise NotImplementedError(self.name)

    def value(self, total: Array) -> Array:
        """Value of the channel from summed statistics (..., K)."""
        return np.asarray(self.per_channel(total)[..., self.channel])


def judged(sources: Sources, *looks: str) -> list[Model]:
    """Models that carry an evaluation, in the page's order."""
    return [m for m in sources.models if m.evaluation is not None and (not looks or m.look in looks)]


def primary(sources: Sources) -> Metric | None:
    """The task's first metric."""
    return sources.task.metrics()[0] if sources.task is not None else None


def overall(sources: Sources) -> list[tuple[Model, Interval]]:
    """The primary metric of every judged model, best role first, with its interval."""
    metric = primary(sources)
    return [(m, estimate(require_evaluation(m), metric)) for m in judged(sources)] if metric is not None else []


def comparisons(sources: Sources) -> list[Comparison]:
    """The claims of the pipeline, each with its paired interval; pairs that were not given are left out."""
    metric = primary(sources)
    if metric is None:
        return []
    found = []
    for kind, (first, second, relative) in CLAIMS.items():
        reference = best_baseline(sources, metric) if first == BASELINE else sources.model(first)
        candidate = sources.model(second)
        if reference is None or candidate is None or reference.evaluation is None or candidate.evaluation is None:
            continue
        interval = drop(reference.evaluation, candidate.evaluation, metric, relative=relative)
        found.append(Comparison(kind, interval, reference.name))
    return found


def best_baseline(sources: Sources, metric: Metric) -> Model | None:
    """The trivial prediction that is hardest to beat."""
    sign = 1.0 if metric.higher_is_better else -1.0
    known = [m for m in judged(sources) if m.look.startswith(BASELINE)]
    return max(known, key=lambda m: sign * require_evaluation(m).value(metric), default=None)


def channels_section(sources: Sources) -> Picture | str | None:
    """The primary metric per output channel, or why it is not there; None where it has a single number."""
    metric, models = primary(sources), judged(sources)
    if metric is None or not models:
        return NO_EVALUATIONS
    labels, parts = _channels(sources, metric)
    if not parts:
        return None
    curves = [Curve(m.name, m.look, tuple(estimate(require_evaluation(m), part) for part in parts)) for m in models]
    return plot_channels(metric.name, labels, curves)


def _channels(sources: Sources, metric: Metric) -> tuple[list[str], list[ChannelMetric]]:
    numbers = tuple(getattr(metric, "channels", ()))
    function = getattr(metric, "per_channel", None)
    if function is None or len(numbers) < 2 or sources.task is None:
        return [], []
    output = next((o for o in sources.task.io.outputs if o.name == getattr(metric, "output", "")), None)
    names = output.channels if output is not None and output.channels else ()
    labels = [names[n] if n < len(names) else str(n) for n in numbers]
    return labels, [ChannelMetric(metric.name, k, function, metric.higher_is_better) for k in range(len(numbers))]


def slices_section(sources: Sources) -> Picture | str:
    """The primary metric in every slice, or why it is not there."""
    metric, models = primary(sources), judged(sources, "teacher", "student", "int8", "scratch")
    if metric is None or not models:
        return NO_EVALUATIONS
    masks = slice_masks(models[0])
    if not masks:
        return "the samples carry no slice labels"

    def curve(model: Model) -> Curve:
        evaluation = require_evaluation(model)
        return Curve(model.name, model.look, tuple(estimate(evaluation, metric, mask=mask) for mask in masks.values()))

    return plot_slices(metric.name, list(masks), [curve(model) for model in models])


def slice_masks(model: Model) -> dict[str, Mask]:
    """Slices of the evaluated samples; a boolean axis gives both sides, `rare` and `not rare`."""
    evaluation = require_evaluation(model)
    masks: dict[str, Mask] = {}
    for name, mask in evaluation.masks().items():
        masks[name] = mask
        if "=" not in name:
            masks[f"not {name}"] = ~mask
    return {name: mask for name, mask in masks.items() if mask.any()}


@dataclass(frozen=True)
class SliceRow:
    """One slice in the table under the plot."""

    name: str
    n_samples: int
    n_groups: int
    values: tuple[float, ...]
    loss: Interval | None


def slice_table(sources: Sources) -> tuple[list[str], list[SliceRow]]:
    """Names of the models, and a row a slice: their values and what INT8 loses against the student there."""
    metric, models = primary(sources), judged(sources, "teacher", "student", "int8", "scratch")
    if metric is None or not models:
        return [], []
    student, int8 = (next((m.evaluation for m in models if m.look == look), None) for look in ("student", "int8"))
    groups = require_evaluation(models[0]).groups
    rows = []
    for name, mask in slice_masks(models[0]).items():
        loss = drop(student, int8, metric, mask=mask) if student is not None and int8 is not None else None
        values = tuple(require_evaluation(m).value(metric, mask) for m in models)
        rows.append(SliceRow(name, int(mask.sum()), len(np.unique(groups[mask])), values, loss))
    return [m.name for m in models], rows


def reliability_section(sources: Sources) -> list[Picture] | str:
    """One diagram for each calibration metric of the task, or why there is none."""
    models = judged(sources, "teacher", "student", "int8")
    if sources.task is None or not models:
        return NO_EVALUATIONS
    pictures = list(_diagrams(sources.task.metrics(), models))
    return pictures or "the task has no calibration metric"


def _diagrams(metrics: tuple[Metric, ...], models: list[Model]) -> Iterator[Picture]:
    for metric in metrics:
        read = getattr(metric, "reliability", None)
        if read is None:
            continue
        bins = []
        for model in models:
            total = require_evaluation(model).total(metric)
            shown = read(total)
            bins.append(Bins(model.name, model.look, shown.confidence, shown.frequency, shown.count,
                             float(metric.value(total))))
        yield plot_reliability(metric.name, bins)


def metric_table(sources: Sources) -> tuple[list[str], list[tuple[str, list[float]]]]:
    """Names of the metrics, and a row a model with all values."""
    if sources.task is None:
        return [], []
    metrics = sources.task.metrics()
    rows = [(m.name, [require_evaluation(m).value(metric) for metric in metrics]) for m in judged(sources)]
    return [metric.name for metric in metrics], rows

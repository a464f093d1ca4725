"""World-model rungs: what a kept world model (or flow) is worth, on samples it never saw.

The truth is what the sensors show later, which is all that such a model is taught; where vehicles really were, seen or
not, stands beside it under `labels`. Persistence says that everything stays where it is in the ego's own frame.

Legend: N samples, T later frames, K statistics.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.evaluate.metrics import ECE, IoU
from fmdeploy.task import Metric
from fmdeploy.teacher.objectives.worldmodel import WorldModel
from fmdeploy.teacher.probe import worldmodel_scores as scores
from fmdeploy.teacher.probe.base import Bench, Judged, StatisticsRung
from fmdeploy.teacher.probe.view import NotMeasuredError, View
from fmdeploy.teacher.probe.worldmodel_futures import (
    DRAWS,
    SECONDS,
    SPLIT,
    Futures,
    codes,
    futures,
    kept,
    world_futures,
)
from fmdeploy.teacher.probe.worldmodel_plan import CANDIDATES, costs

HORIZONS = (2, 4, 8)  # frames ahead: +0.4, +0.8 and +1.6 s, those of the task
Found = tuple[Metric, Array]  # a metric and its statistics (N, K)


class WorldRung(StatisticsRung):
    """A rung on predicted futures; the network at random initialisation has no world model to compare."""

    compared = False

    def judge(self, view: View, bench: Bench) -> Judged:
        """The row's statistics and the further ones."""
        said = self.futures(view)
        own, also = self.scores(said, view)
        further = {name: (metric, _evaluation(view, said, metric, rows)) for name, (metric, rows) in also.items()}
        return Judged(_evaluation(view, said, *own), further, self.chosen(said))

    def futures(self, view: View) -> Futures:
        """What is judged.

        Raises:
            NotMeasuredError: the network keeps no model of the future.
        """
        return futures(view)

    @abstractmethod
    def scores(self, said: Futures, view: View) -> tuple[Found, Mapping[str, Found]]:
        """The row's metric with its statistics, and further ones by name."""

    def chosen(self, said: Futures) -> Mapping[str, Any]:
        """What the row says about how it was measured."""
        return {"samples": len(said.index), "draws": DRAWS}


class OneStep(WorldRung):
    """IoU of what is seen one frame later, with the codes' cross entropy and accuracy beside it."""

    name = "world-one-step"
    metric_name = "iou@+0.2s"

    def metric(self) -> Metric:
        """IoU of one frame."""
        return scores.Overlap(channels=(0,))

    def futures(self, view: View) -> Futures:
        """The first frame, of a world model only."""
        return world_futures(view).at((1,))

    def scores(self, said: Futures, view: View) -> tuple[Found, Mapping[str, Found]]:
        """See `WorldRung.scores`."""
        own, also = _against_persistence(said, self.metric())
        found = codes(view, "true")
        return own, {
            **also,
            "code accuracy": (scores.Mean("code_accuracy"), scores.mean_rows(found.right[:, :1])),
            "code nats": (scores.Mean("code_nats", False), scores.mean_rows(found.nats[:, :1])),
        }


class MultiStep(WorldRung):
    """Mean IoU at +0.4, +0.8 and +1.6 s of a rollout that never sees a later frame."""

    name = "world-multi-step"
    metric_name = "iou +0.4..+1.6s"

    def metric(self) -> Metric:
        """Mean IoU of the horizons."""
        return scores.Overlap(channels=tuple(range(len(HORIZONS))))

    def futures(self, view: View) -> Futures:
        """The horizons."""
        return super().futures(view).at(HORIZONS)

    def scores(self, said: Futures, view: View) -> tuple[Found, Mapping[str, Found]]:
        """See `WorldRung.scores`."""
        own, also = _against_persistence(said, self.metric())
        return own, {**also, **_by_horizon(said)}


class ActionSensitivity(WorldRung):
    """How many nats a code costs more when the model is told how another ego moved; zero where it does not listen."""

    name = "world-actions"
    metric_name = "nats lost to others' actions"
    unit = "nats"

    def metric(self) -> Metric:
        """Mean difference."""
        return scores.Mean("nats")

    def futures(self, view: View) -> Futures:
        """All frames.

        Raises:
            NotMeasuredError: none is kept, or it was trained without actions.
        """
        model = kept(view, "worldmodel")
        if not (isinstance(model, WorldModel) and model.config.actions):
            raise NotMeasuredError("the world model was trained without actions (--set worldmodel.actions=true)")
        return world_futures(view)

    def scores(self, said: Futures, view: View) -> tuple[Found, Mapping[str, Found]]:
        """See `WorldRung.scores`."""
        true, others, zero = (codes(view, motion) for motion in ("true", "others", "zero"))
        pictures = {"true": scores.decided(said.said), "others": scores.decided(others.said)}
        gain = scores.OverlapGain("iou", len(said.offsets))
        return (self.metric(), scores.mean_rows(others.nats - true.nats)), {
            "nats lost to standing still": (self.metric(), scores.mean_rows(zero.nats - true.nats)),
            "iou lost to others' actions": (gain, gain.statistics(pictures, {"seen": said.seen})),
        }


class FutureCalibration(WorldRung):
    """Calibration error of the predicted probabilities over all cells; the Brier score and its rivals beside it."""

    name = "world-calibration"
    metric_name = "ece"
    higher_is_better = False

    def metric(self) -> Metric:
        """Calibration error; its statistics do not depend on the number of frames."""
        return ECE()

    def scores(self, said: Futures, view: View) -> tuple[Found, Mapping[str, Found]]:
        """See `WorldRung.scores`."""
        brier = scores.Mean("brier", False)
        return (self.metric(), scores.ece_rows(said.said, said.seen)), {
            "brier": (brier, scores.brier_rows(said.said, said.seen)),
            "brier of persistence": (brier, scores.brier_rows(said.persistence(), said.seen)),
            "brier of the base rate": (brier, scores.brier_rows(_base_rate(said), said.seen)),
            "ece, labels": (self.metric(), scores.ece_rows(said.said, said.labelled)),
        }


class PlanningCost(WorldRung):
    """Rank correlation of a planning cost on the predicted future with the same cost on the true one.

    Over samples and candidate manoeuvres; the truth is the labelled occupancy, for a car that no sensor saw is hit
    all the same.
    """

    name = "world-planning"
    metric_name = "spearman"

    def metric(self) -> Metric:
        """Correlation of ranks."""
        return scores.Correlation("spearman")

    def scores(self, said: Futures, view: View) -> tuple[Found, Mapping[str, Found]]:
        """See `WorldRung.scores`."""
        priced = {name: costs(each, said.offsets) for name, each in (
            ("said", said.said), ("labels", said.labelled), ("seen", said.seen), ("persistence", said.persistence()))}
        rank = {name: scores.ranks(cost) for name, cost in priced.items()}
        pearson = scores.Correlation("pearson")
        return (self.metric(), scores.correlation_rows(rank["said"], rank["labels"])), {
            "pearson": (pearson, scores.correlation_rows(priced["said"], priced["labels"])),
            "spearman, seen": (self.metric(), scores.correlation_rows(rank["said"], rank["seen"])),
            "spearman of persistence": (self.metric(), scores.correlation_rows(rank["persistence"], rank["labels"])),
            "pearson of persistence": (pearson, scores.correlation_rows(priced["persistence"], priced["labels"])),
        }

    def chosen(self, said: Futures) -> Mapping[str, Any]:
        """See `WorldRung.chosen`."""
        return {**super().chosen(said), "candidates": list(CANDIDATES)}


def _evaluation(view: View, said: Futures, metric: Metric, rows: Array) -> Evaluation:
    return view.evaluation(metric, rows, SPLIT, said.index)


def _against_persistence(said: Futures, metric: Metric) -> tuple[Found, Mapping[str, Found]]:
    """IoU of what was seen; persistence, the gain over it, and the IoU with the labels beside it."""
    picture, copied = scores.decided(said.said), said.persistence()
    gain = scores.OverlapGain("gain", len(said.offsets))
    return (metric, scores.overlap_rows(picture, said.seen)), {
        "persistence": (metric, scores.overlap_rows(copied, said.seen)),
        "gain over persistence": (gain, gain.statistics({"a": picture, "b": copied}, {"seen": said.seen})),
        "iou, labels": (metric, scores.overlap_rows(picture, said.labelled)),
        "persistence, labels": (metric, scores.overlap_rows(copied, said.labelled)),
    }


def _by_horizon(said: Futures) -> Mapping[str, Found]:
    """IoU at each frame, and the gain over persistence."""
    found: dict[str, Found] = {}
    for offset in said.offsets:
        one = said.at((offset,))
        picture, gain, label = scores.decided(one.said), scores.OverlapGain("gain", 1), f"+{SECONDS * offset:.1f}s"
        iou = IoU(f"iou@{label}", channels=(0,))
        found[iou.name] = (iou, scores.overlap_rows(picture, one.seen))
        found[f"gain@{label}"] = (gain, gain.statistics({"a": picture, "b": one.persistence()}, {"seen": one.seen}))
    return found


def _base_rate(said: Futures) -> Array:
    """The mean of every cell over these very samples: what no forecast without inputs can beat."""
    rate: Array = said.seen.mean(0, keepdims=True, dtype="float32")
    return np.broadcast_to(rate, said.seen.shape)

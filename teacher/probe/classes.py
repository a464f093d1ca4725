"""Rungs that say which class a sample is of, and are judged by their accuracy.

Legend: N samples, M those whose class is known, C classes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from fmdeploy.evaluate.metrics import Accuracy
from fmdeploy.task import Metric
from fmdeploy.teacher.probe.base import Bench, Judged, NotMeasuredError, StatisticsRung, View
from fmdeploy.teacher.probe.labels import class_count, class_labels

Labels = dict[str, Tensor]  # split -> int64 (N,)


class ClassRung(StatisticsRung):
    """Accuracy on the test split of whatever `answer` says."""

    metric_name = "accuracy"

    def metric(self) -> Metric:
        """Accuracy of the answers."""
        return Accuracy("accuracy", "probe", "label")

    @abstractmethod
    def answer(self, view: View, labels: Labels, classes: int) -> tuple[Tensor, dict[str, Any]]:
        """Scores (N, C) of the test samples, and what was chosen on val."""

    def judge(self, view: View, bench: Bench) -> Judged:
        """See `StatisticsRung.judge`."""
        task = view.subject.task
        labels = {split: torch.from_numpy(class_labels(task, view.targets(split)))
                  for split in ("train", "val", "test")}
        scores_NC, chosen = self.answer(view, _checked(labels, class_count(task)), class_count(task))
        scores_MC, label_M = told(scores_NC.float(), labels["test"])
        stats = self.metric().statistics({"probe": scores_MC.numpy()}, {"label": label_M.numpy()})
        index = view.index("test")[(labels["test"] >= 0).numpy()]
        return Judged(view.evaluation(self.metric(), stats, index=index), chosen=chosen)


def told(rows_NX: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and labels of the samples whose class is known; a label below 0 says that it is not."""
    return rows_NX[labels_N >= 0], labels_N[labels_N >= 0]


def _checked(labels: Labels, classes: int) -> Labels:
    for split, label_N in labels.items():
        if not (label_N >= 0).any():
            raise NotMeasuredError(f"no sample of {split} has a class label")
        if (label_N >= classes).any():
            raise NotMeasuredError(f"a class label of {split} is {int(label_N.max())}, and there are {classes} classes")
    return labels

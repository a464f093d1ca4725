"""Rungs that say which class a sample is of, and are judged by their accuracy.

Legend: N samples, C classes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmdeploy.evaluate.metrics import Accuracy
from fmdeploy.task import Metric
from fmdeploy.teacher.probe.base import Bench, Judged, StatisticsRung, View
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
        scores_NC, chosen = self.answer(view, labels, class_count(task))
        stats = self.metric().statistics({"probe": scores_NC.float().numpy()}, {"label": np.asarray(labels["test"])})
        return Judged(view.evaluation(self.metric(), stats), chosen=chosen)

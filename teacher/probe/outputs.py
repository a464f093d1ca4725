"""The network's own outputs, where they were trained: the first metric of its task, with an interval.

The only rung of accuracy that a BUNDLE has, and what the probes' numbers are read against.
"""

from __future__ import annotations

import numpy as np

from fmdeploy.teacher.probe.base import Bench, Judged, NotMeasuredError, StatisticsRung, View

BATCH = 64


class Outputs(StatisticsRung):
    """The task's primary metric of the network as it is."""

    name = "outputs"
    metric_name = "primary metric"
    compared = False  # the outputs of random weights say nothing

    def judge(self, view: View, bench: Bench) -> Judged:
        """See `StatisticsRung.judge`."""
        predict = view.subject.predict
        if predict is None:
            raise NotMeasuredError("the outputs were never trained: it is a backbone")
        samples, index, rows = view.samples("test"), view.index("test"), []
        metric = view.subject.task.metrics()[0]
        for at in range(0, len(index), BATCH):
            inputs, targets = samples.batch(index[at : at + BATCH])
            rows.append(metric.statistics(predict(inputs), targets))
        return Judged(view.evaluation(metric, np.concatenate(rows)), metric=metric)

"""Linear probe: multinomial logistic regression on frozen pooled features (arXiv:1610.01644).

Legend: N samples, P pooled features, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fmdeploy.evaluate.metrics import Accuracy
from fmdeploy.task import Metric
from fmdeploy.teacher.probe.base import Bench, Judged, StatisticsRung, View
from fmdeploy.teacher.probe.labels import class_count, class_labels
from fmdeploy.teacher.probe.pooled import standardised

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
ITERATIONS = 100


def fit_logistic(x_NP: Tensor, y_N: Tensor, classes: int, strength: float) -> Tensor:
    """Weights float64 (P + 1, C), the last row a bias, that minimise cross entropy + strength / 2 |W|².

    Full batch L-BFGS from zero: convex, so the result is the optimum whatever the start, and no step is drawn.
    """
    weights = torch.zeros(x_NP.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-6, tolerance_change=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(logits(x_NP, weights), y_N) + strength / 2 * weights[:-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()


def logits(x_NP: Tensor, weights: Tensor) -> Tensor:
    """Logits (N, C)."""
    return x_NP @ weights[:-1] + weights[-1]


class Linear(StatisticsRung):
    """Scene accuracy of a linear classifier; its strength is chosen on val."""

    name = "linear"
    metric_name = "accuracy"

    def metric(self) -> Metric:
        """Accuracy of the probe."""
        return Accuracy("accuracy", "probe", "label")

    def judge(self, view: View, bench: Bench) -> Judged:
        """See `StatisticsRung.judge`."""
        task = view.subject.task
        labels = {split: torch.from_numpy(class_labels(task, view.targets(split)))
                  for split in ("train", "val", "test")}
        x = {split: standardised(view, split) for split in labels}
        fitted = {strength: fit_logistic(x["train"], labels["train"], class_count(task), strength)
                  for strength in STRENGTHS}

        def worth(strength: float) -> tuple[float, float]:
            said = logits(x["val"], fitted[strength])
            return float((said.argmax(1) == labels["val"]).double().mean()), -float(cross_entropy(said, labels["val"]))

        best = max(STRENGTHS, key=worth)
        answers = logits(x["test"], fitted[best]).float().numpy()
        stats = self.metric().statistics({"probe": answers}, {"label": np.asarray(labels["test"])})
        return Judged(view.evaluation(self.metric(), stats), chosen={"strength": best})

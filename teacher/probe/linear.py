"""Linear probe: multinomial logistic regression on frozen pooled features (arXiv:1610.01644).

Legend: N samples, P pooled features, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fmdeploy.teacher.probe.base import View
from fmdeploy.teacher.probe.classes import ClassRung, Labels, told
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


class Linear(ClassRung):
    """Scene accuracy of a linear classifier; its strength is chosen on val."""

    name = "linear"

    def answer(self, view: View, labels: Labels, classes: int) -> tuple[Tensor, dict[str, Any]]:
        """See `ClassRung.answer`."""
        train, val = (told(standardised(view, split), labels[split]) for split in ("train", "val"))
        fitted = {strength: fit_logistic(*train, classes, strength) for strength in STRENGTHS}

        def worth(strength: float) -> tuple[float, float]:
            said = logits(val[0], fitted[strength])
            return float((said.argmax(1) == val[1]).double().mean()), -float(cross_entropy(said, val[1]))

        best = max(STRENGTHS, key=worth)
        return logits(standardised(view, "test"), fitted[best]), {"strength": best}

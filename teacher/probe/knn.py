"""k nearest neighbours on frozen pooled features, weighted as in DINO (arXiv:2104.14294, appendix F.1).

Each of the k most similar train samples votes for its class with weight exp(s / 0.07), where s is the cosine of the two
standardised feature vectors. k is chosen on val; DINO found 20 to be the best on ImageNet.

Legend: N queries, M train samples, P pooled features, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from fmdeploy.teacher.probe.base import View
from fmdeploy.teacher.probe.classes import ClassRung, Labels, told
from fmdeploy.teacher.probe.pooled import standardised

NEIGHBOURS = (20, 10, 50, 5)  # DINO's own first: it wins where val cannot tell
TEMPERATURE = 0.07
CHUNK = 512


def votes(queries_NP: Tensor, train_MP: Tensor, labels_M: Tensor, classes: int, k: int) -> Tensor:
    """Weighted votes (N, C); all vectors of length one."""
    found = []
    for part_BP in torch.split(queries_NP, CHUNK):
        near = (part_BP @ train_MP.T).topk(min(k, len(train_MP)), dim=1)
        weight_BK = (near.values / TEMPERATURE).exp()
        found.append((weight_BK[..., None] * one_hot(labels_M[near.indices], classes)).sum(1))
    return torch.cat(found)


class Knn(ClassRung):
    """Scene accuracy of the weighted vote; k is chosen on val."""

    name = "knn"

    def answer(self, view: View, labels: Labels, classes: int) -> tuple[Tensor, dict[str, Any]]:
        """See `ClassRung.answer`."""
        x = {split: normalize(standardised(view, split), dim=1) for split in labels}
        train, val = told(x["train"], labels["train"]), told(x["val"], labels["val"])

        def worth(k: int) -> float:
            return float((votes(val[0], *train, classes, k).argmax(1) == val[1]).double().mean())

        best = max(NEIGHBOURS, key=worth)
        return votes(x["test"], *train, classes, best), {"k": best}

"""Several teachers as one: their probabilities averaged, given back as logits.

Legend: K teachers, B batch; `...` any shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from fmdeploy.task import Task


def averaged(task: Task, answers: Sequence[dict[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Logits of the mean probability of each output (B, ...); a single teacher's stay as they are.

    A mean of probabilities is what an ensemble predicts (arXiv:1503.02531, section 3, its arithmetic mean). In terms
    of logarithms, so that certain answers do not overflow: for sigmoids log sum w p - log sum w (1 - p), for softmax
    log sum w p.

    Args:
        task: Says which outputs are softmax.
        answers: One mapping of logits a teacher, all with the same outputs.
        shares: Weight of each teacher; they sum to 1.
    """
    if len(answers) == 1:
        return dict(answers[0])
    names = [spec.name for spec in task.io.outputs]
    exclusive = task.exclusive()
    log_shares = torch.tensor(shares, dtype=torch.float64).log().float()
    return {name: _mean([each[name].float() for each in answers], log_shares, name in exclusive) for name in names}


def _mean(logits: list[Tensor], log_shares: Tensor, softmax: bool) -> Tensor:
    stacked_K = torch.stack(logits)
    weight_K = log_shares.to(stacked_K.device).view(-1, *[1] * (stacked_K.ndim - 1))
    if softmax:
        return torch.logsumexp(log_softmax(stacked_K, dim=2) + weight_K, 0)
    return torch.logsumexp(logsigmoid(stacked_K) + weight_K, 0) - torch.logsumexp(logsigmoid(-stacked_K) + weight_K, 0)

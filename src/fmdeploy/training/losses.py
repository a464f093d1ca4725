"""Losses that several tasks share. Soft-target losses are exactly zero where student and teacher agree.

Legend: B batch, C channels or classes, H W rows and columns; `...` any shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmdeploy.training.distributed import mean_over_ranks, sum_over_ranks, world

EPSILON = 1e-6


def kl_divergence(logits_BC: Tensor, teacher_BC: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of the softmax over the last axis, mean over all other axes.

    Times temperature², which keeps the size of the gradient (arXiv:1503.02531, section 2). Both inputs are logits.
    """
    log_q = F.log_softmax(logits_BC.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher_BC.float() / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2


def bernoulli_kl(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of one Bernoulli variable an element, mean over all; both inputs are logits (...).

    In terms of softplus A it is the Bregman divergence A(s) - A(t) - A'(t) (s - t), with A' the sigmoid: binary cross
    entropy with soft targets minus the teacher's entropy, with nothing to cancel. The gradient A'(s) - A'(t) is written
    out, because autograd's way costs half as much again, and this runs on every cell of every sample.
    """
    loss: Tensor = _BernoulliKL.apply(logits.float(), teacher.float())  # type: ignore[no-untyped-call]
    return loss


class _BernoulliKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        chance = torch.sigmoid(teacher)
        ctx.save_for_backward(torch.sigmoid(student).sub_(chance))
        slope = (student - teacher).mul_(chance)
        return F.softplus(student).sub_(F.softplus(teacher)).sub_(slope).mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (gradient / difference.numel()), None


def class_loss(logits_BC: Tensor, label_B: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Cross entropy, mean over the batch; a label below 0 is unknown and counts nothing, `weight_B` weighs samples.

    The mean goes over the known labels of all processes; weights are expected to average 1, so that processes need not
    share them.
    """
    known = mean_over_ranks((label_B >= 0).sum().float()).clamp(min=1 / world()[1])
    if weight_B is None:
        return F.cross_entropy(logits_BC, label_B.long(), ignore_index=-1, reduction="sum") / known
    loss_B = F.cross_entropy(logits_BC, label_B.long(), ignore_index=-1, reduction="none")
    return (loss_B * weight_B).sum() / known


def soft_dice(probability_BCHW: Tensor, target_BCHW: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """One minus the Dice coefficient of each channel over the whole batch of all processes, mean over channels.

    Squared denominators (V-Net, arXiv:1606.04797, section 3) make it zero for equal soft targets, not only for
    binary ones. Over the batch, not per sample: most channels of one sample are nearly empty. `weight_B` weighs
    samples.
    """
    axes = (0, 2, 3)
    products = [probability_BCHW * target_BCHW, probability_BCHW.square(), target_BCHW.square()]
    if weight_B is not None:
        products = [product * weight_B[:, None, None, None] for product in products]
    total_3C = sum_over_ranks(torch.stack([product.sum(axes) for product in products]))
    overlap_C = (2 * total_3C[0] + EPSILON) / (total_3C[1] + total_3C[2] + EPSILON)
    return (1 - overlap_C).mean()


def weighted_bce(
    logits_BCHW: Tensor, labels_BCHW: Tensor, positive: Sequence[float], weight: Sequence[float],
    weight_B: Tensor | None = None,
) -> Tensor:
    """Binary cross entropy, mean over batch and cells, summed over channels with `weight`.

    Args:
        logits_BCHW: float logits.
        labels_BCHW: float labels in [0, 1].
        positive: Weight of occupied cells for each channel.
        weight: Weight of each channel.
        weight_B: Weight of each sample.
    """
    shape = (1, -1, 1, 1)
    positive_C = logits_BCHW.new_tensor(positive).view(shape)
    weight_C = logits_BCHW.new_tensor(weight).view(shape)
    loss_BCHW = F.binary_cross_entropy_with_logits(
        logits_BCHW, labels_BCHW, weight=weight_C, pos_weight=positive_C, reduction="none"
    )
    if weight_B is not None:
        loss_BCHW = loss_BCHW * weight_B[:, None, None, None]
    return loss_BCHW.mean((0, 2, 3)).sum()


def feature_distance(student: Tensor, teacher: Tensor, axis: int) -> Tensor:
    """Smooth L1 between layer-normed features of equal shape, mean over all elements.

    Normalising each position over `axis` takes away the scale of the teacher's channels, which a projector would
    have to learn first (the whitened target of arXiv:2205.14141, section 3.1).
    """
    return F.smooth_l1_loss(_standardised(student, axis), _standardised(teacher, axis))


def _standardised(x: Tensor, axis: int) -> Tensor:
    rows = x.float().movedim(axis, -1).flatten(0, -2)
    return F.layer_norm(rows, rows.shape[-1:])

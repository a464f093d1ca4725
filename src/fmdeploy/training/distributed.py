"""What must be summed over all processes so that two of them compute what one would.

Legend: B batch, C channels, H W rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world() -> tuple[int, int]:
    """Rank and number of processes: (0, 1) when torch.distributed is not in use."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of `x` over all processes, on each of them; gradients are summed likewise.

    A loss that is a function of such sums has, after DistributedDataParallel has averaged the gradients, exactly
    the gradient of the same loss on the whole batch.
    """
    if world()[1] == 1:
        return x
    total: Tensor = _SumOverRanks.apply(x)  # type: ignore[no-untyped-call]
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of `x` over all processes, without gradient."""
    size = world()[1]
    if size == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / size


def share_batch_norm(model: nn.Module) -> nn.Module:
    """Let every BatchNorm2d of `model` use the statistics of the batch of all processes; in place.

    `torch.nn.SyncBatchNorm` refuses CPU tensors, so gloo needs this one. Nothing changes on a single process.
    """
    if world()[1] > 1:
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SharedBatchNorm2d
    return model


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose mean and variance go over the batches of all processes (arXiv:1502.03167)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalise `(B, C, H, W)`; outside training this is the ordinary BatchNorm."""
        if not self.training:
            return super().forward(x_BCHW)
        wide_BCHW = x_BCHW.float()
        count = x_BCHW.numel() / x_BCHW.shape[1] * world()[1]
        mean_C = sum_over_ranks(wide_BCHW.sum((0, 2, 3))) / count
        centred_BCHW = wide_BCHW - mean_C[:, None, None]
        var_C = sum_over_ranks(centred_BCHW.square().sum((0, 2, 3))) / count
        self._follow(mean_C.detach(), var_C.detach() * (count / (count - 1)))
        scale_C = self.weight * torch.rsqrt(var_C + self.eps)
        y_BCHW = centred_BCHW * scale_C[:, None, None] + self.bias[:, None, None]
        return y_BCHW.to(x_BCHW.dtype)

    def _follow(self, mean_C: Tensor, var_C: Tensor) -> None:
        for buffer, value_C in ((self.running_mean, mean_C), (self.running_var, var_C)):
            if buffer is not None:
                buffer.lerp_(value_C, self.momentum or 0.1)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)

"""BatchNorm over the batches of all processes.

Legend: B batch, C channels, H W rows and columns, R processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fmdeploy.training.distributed import add_up, world


def share_batch_norm(model: nn.Module) -> nn.Module:
    """Let every BatchNorm2d of `model` use the statistics of the batch of all processes; in place.

    `torch.nn.SyncBatchNorm` refuses CPU tensors, so gloo needs this one. Nothing changes on a single process.
    """
    if world()[1] > 1:
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SharedBatchNorm2d
    return model


KNOWN = ("torch", "fmdeploy", "transformers", "peft", "modelopt")
"""Packages whose buffers are the same in all processes: constants, or made of sums over all of them."""


def keeps_own_buffers(model: nn.Module) -> bool:
    """Whether some module may follow the batch of its own process alone.

    A normalisation that `share_batch_norm` leaves does, and whatever has buffers and was written by somebody else may.
    """
    return any(type(module) not in (nn.BatchNorm2d, SharedBatchNorm2d)
               and next(module.buffers(recurse=False), None) is not None
               and (isinstance(module, _NormBase) or type(module).__module__.partition(".")[0] not in KNOWN)
               for module in model.modules())


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose mean and variance go over the batches of all processes (arXiv:1502.03167)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalise `(B, C, H, W)`; outside training this is the ordinary BatchNorm."""
        if not self.training:
            return super().forward(x_BCHW)
        y_BCHW, mean_C, var_C = _SharedNorm.apply(  # type: ignore[no-untyped-call]
            x_BCHW.float(), self.weight, self.bias, self.eps)
        count = x_BCHW.numel() / x_BCHW.shape[1] * world()[1]
        self._follow(mean_C, var_C * (count / (count - 1)))
        return y_BCHW.to(x_BCHW.dtype)  # type: ignore[no-any-return]

    def _follow(self, mean_C: Tensor, var_C: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum  # None: mean of all
        self.running_mean.lerp_(mean_C, share)
        self.running_var.lerp_(var_C, share)


class _SharedNorm(torch.autograd.Function):
    """Normalises by mean and variance over all processes, which hold equally many samples.

    The kernels are those of BatchNorm on one process; one message each way makes up for what the others hold. Each
    process's own mean and variance are put together after Chan et al. (Stanford CS-79-773): sums of x and of its square
    would cancel where the mean is large.
    """

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> tuple[Tensor, ...]:
        own_2C = torch.stack(torch.batch_norm_update_stats(x_BCHW, None, None, 0.0))
        rank, size = world()
        all_R2C = own_2C.new_zeros(size, *own_2C.shape)
        all_R2C[rank] = own_2C
        add_up(all_R2C)
        means_RC, vars_RC = all_R2C.unbind(1)
        mean_C = means_RC.mean(0)
        var_C = vars_RC.mean(0) + (means_RC - mean_C).square().mean(0)
        ctx.save_for_backward(x_BCHW, weight_C, mean_C, torch.rsqrt(var_C + eps))
        ctx.eps = eps
        ctx.mark_non_differentiable(mean_C, var_C)
        y_BCHW = torch.nn.functional.batch_norm(x_BCHW, mean_C, var_C, weight_C, bias_C, training=False, eps=eps)
        return y_BCHW, mean_C, var_C

    @staticmethod
    def backward(ctx: Any, dy_BCHW: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, weight_C, mean_C, inverse_C = ctx.saved_tensors
        dx_BCHW, dweight_C, dbias_C = torch.ops.aten.native_batch_norm_backward(
            dy_BCHW, x_BCHW, weight_C, None, None, mean_C, inverse_C, True, ctx.eps, [True, True, True])
        # The kernel has taken away the means of dy and of dy * xhat over this process's samples, not over all.
        own_2C = torch.stack([dbias_C, dweight_C]) / (x_BCHW.numel() / x_BCHW.shape[1])
        total_2C = own_2C.clone()
        add_up(total_2C)
        missed_2C = own_2C - total_2C / world()[1]
        shift_C, slope_C = (missed_2C if weight_C is None else missed_2C * weight_C) * inverse_C
        slope_C = slope_C * inverse_C
        dx_BCHW.add_((shift_C - slope_C * mean_C)[:, None, None]).addcmul_(x_BCHW, slope_C[:, None, None])
        return dx_BCHW, *((None, None) if weight_C is None else (dweight_C, dbias_C)), None

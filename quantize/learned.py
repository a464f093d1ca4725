"""Fake quantisation for training, with ranges that are frozen or learned, in as few passes over memory as possible.

During training these modules stand in for modelopt's quantizers, which compute the same grid but keep a mask of every
tensor for the way back; torch's own fake-quantise kernels are not vectorised on a CPU and three times slower than the
four plain passes here (measured). Afterwards modelopt's quantizers return with the ranges that came out, snapped to the
grid. modelopt 0.47 has learned scales (LSQ) for block-scaled NVFP4 weights only.

The gradient of a learned scale is that of LSQ (arXiv:1902.08153), with s = amax / 127, q = x / s and y the result:

    dy/ds = round(q) - q = (y - x) / s inside -128 … 127, y / s outside;      times 1 / sqrt(127 · N)

What is trained is θ, with amax = amax₀ · exp(RATE · θ): in the logarithm a step means the same for every scale
(arXiv:1903.08066), and Adam, which moves each parameter by its rate whatever the gradient, needs a faster one for
scales than for weights.
"""

# B batch, C output channels, N elements that share a scale: of a weight's channel, or of one sample of an activation

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fmdeploy.quantize import modelopt
from fmdeploy.quantize.grid import fp16_amax

LOW, HIGH = -128, 127
RATE = 10.0


class _Round(torch.autograd.Function):
    """The INT8 grid of one range, or of one range a channel of the first axis (C, 1, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, factor: float) -> Tensor:
        steps = HIGH / amax
        y = torch.mul(x, steps).round_().clamp_(LOW, HIGH).div_(steps)
        ctx.factor = factor
        ctx.save_for_backward(x, steps, *((y,) if factor else ()))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, steps, *results = ctx.saved_tensors
        passed = _inside(grad, x, steps)
        if not results:
            return passed, None, None
        slope = _dot(grad, results[0], steps) - _dot(passed, x, steps)
        return passed, slope * steps * (ctx.factor / HIGH), None  # of amax, which is 127 scales


def _dot(a: Tensor, b: Tensor, steps: Tensor) -> Tensor:
    """Sum of `a` times `b` over all that shares a scale, in the shape of `steps`."""
    if steps.numel() > 1:
        return (a * b).flatten(1).sum(1).view(steps.shape)
    if a.stride() != b.stride() or not a.is_contiguous(memory_format=_layout(a)):
        return (a * b).sum().view(steps.shape)
    # Both lie in memory alike and without gaps: one pass that writes nothing.
    return torch.dot(*(t.as_strided((t.numel(),), (1,)) for t in (a, b))).view(steps.shape)


def _layout(a: Tensor) -> torch.memory_format:
    last = a.ndim == 4 and a.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _inside(grad: Tensor, x: Tensor, steps: Tensor) -> Tensor:
    """`grad` where `x` rounds to a step of the grid, 0 where it is clipped."""
    if steps.numel() == 1 and not x.is_cuda:  # one vectorised pass; on a GPU it would wait for the number
        step = 1 / float(steps)
        found: Tensor = torch.ops.aten.hardtanh_backward(grad, x, (LOW - 0.5) * step, (HIGH + 0.5) * step)
        return found
    place = x * steps
    return grad * ((place > LOW - 0.5) & (place < HIGH + 0.5))


class TrainingQuantizer(nn.Module):
    """Rounds to the INT8 grid; gradients pass inside the range and stop outside (straight-through, arXiv:1308.3432).

    Args:
        amax: Largest magnitude on the grid: () for a whole tensor, (C, 1, ...) for one a channel of the first axis.
        learn: Train the range.
    """

    def __init__(self, amax: Tensor, *, learn: bool) -> None:
        super().__init__()
        self.shape = amax.shape
        self.start_C: Tensor
        self.register_buffer("start_C", amax.detach().float().reshape(-1).clone())
        # One axis, so that weight decay, which spares vectors, leaves it alone.
        self.theta_C = nn.Parameter(torch.zeros_like(self.start_C)) if learn else None

    @property
    def amax(self) -> Tensor:
        """The range as it is now, in the shape it was given."""
        return self._range().detach()

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantise `x` of any shape; (C, ...) where there is one range a channel."""
        channels = self.start_C.numel()
        count = x.numel() // channels if channels > 1 else x[0].numel()
        factor = 0.0 if self.theta_C is None else (HIGH * max(count, 1)) ** -0.5
        found: Tensor = _Round.apply(x, self._range(), factor)  # type: ignore[no-untyped-call]
        return found

    def _range(self) -> Tensor:
        amax_C = self.start_C if self.theta_C is None else self.start_C * torch.exp(RATE * self.theta_C)
        return amax_C.reshape(self.shape)


@contextmanager
def training_quantizers(model: nn.Module, *, learn: bool) -> Iterator[dict[str, TrainingQuantizer]]:
    """Train `model` inside this context; afterwards its own quantizers are back, with the ranges that came out.

    Args:
        model: calibrated, from `build.build`.
        learn: Train the ranges; frozen ones come back bit by bit, learned ones snapped to the grid.

    Yields:
        Name of the quantizer → what stands there.
    """
    own = dict(modelopt.quantizers(model))
    start = modelopt.ranges(model)
    stand_ins = {name: TrainingQuantizer(start[name], learn=learn) for name in own}
    for name, quantizer in stand_ins.items():
        _put(model, name, quantizer)
    try:
        yield stand_ins
    finally:
        for name, quantizer in own.items():
            _put(model, name, quantizer.to(stand_ins[name].start_C.device))
    if learn:
        modelopt.set_ranges(model, {name: fp16_amax(each.amax.cpu()) for name, each in stand_ins.items()})


def _put(model: nn.Module, name: str, quantizer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    # Not setattr: modelopt's modules guard their attributes, and look their quantizers up here.
    model.get_submodule(parent)._modules[leaf] = quantizer

"""Fake quantisation for training: one fused kernel a tensor, with scales that are frozen or learned.

During training these modules stand in for modelopt's quantizers, which compute the same grid in a dozen passes over
memory; afterwards modelopt's return with the ranges that came out, snapped to the grid. modelopt 0.47 has learned
scales (LSQ) for block-scaled NVFP4 weights only.

The gradient of a learned scale is that of LSQ (arXiv:1902.08153), with s = amax / 127 and q = x / s:

    dx̂/ds = round(q) - q inside -128 … 127,  -128 or 127 outside;      times 1 / sqrt(127 · N)

What is trained is θ, with amax = amax₀ · exp(RATE · θ): in the logarithm a step means the same for every scale
(arXiv:1903.08066), and Adam, which moves each parameter by its rate whatever the gradient, needs a faster one for
scales than for weights.
"""

# B batch, C output channels, N elements that share a scale

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fmdeploy.quantize import modelopt
from fmdeploy.quantize.grid import fp16_amax

LOW, HIGH = -128, 127
RATE = 10.0


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
        self.zero_C: Tensor
        self.register_buffer("zero_C", torch.zeros_like(self.start_C), persistent=False)

    @property
    def amax(self) -> Tensor:
        """The range as it is now, in the shape it was given."""
        return self._range().detach().reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantise `x` of any shape; (C, ...) where there is one range a channel."""
        x = x.contiguous() if self.start_C.numel() > 1 else x
        scale_C = self._range() / HIGH
        if self.theta_C is None:
            return self._frozen(x, scale_C)
        count = x.numel() // self.start_C.numel() if self.start_C.numel() > 1 else x[0].numel()
        factor = (HIGH * max(count, 1)) ** -0.5
        return self._learned(x, scale_C, factor)

    def _range(self) -> Tensor:
        return self.start_C if self.theta_C is None else self.start_C * torch.exp(RATE * self.theta_C)

    def _frozen(self, x: Tensor, scale_C: Tensor) -> Tensor:
        zero_C = self.zero_C.int()
        if scale_C.numel() == 1:
            return torch.fake_quantize_per_tensor_affine(x, scale_C, zero_C, LOW, HIGH)
        return torch.fake_quantize_per_channel_affine(x, scale_C, zero_C, 0, LOW, HIGH)

    def _learned(self, x: Tensor, scale_C: Tensor, factor: float) -> Tensor:
        if scale_C.numel() == 1:
            return torch._fake_quantize_learnable_per_tensor_affine(x, scale_C, self.zero_C, LOW, HIGH, factor)
        return torch._fake_quantize_learnable_per_channel_affine(x, scale_C, self.zero_C, 0, LOW, HIGH, factor)


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

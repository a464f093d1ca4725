"""What must be summed over all processes so that two of them compute what one would."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fmdeploy.training.neighbours import Neighbours, meet


def world() -> tuple[int, int]:
    """Rank and number of processes: (0, 1) when torch.distributed is not in use."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def add_up(x: Tensor) -> None:
    """Replace `x`, contiguous, by its sum over all processes, bit for bit the same on each of them."""
    if world()[1] == 1:
        return
    near = _neighbours() if x.device.type == "cpu" else None
    if near is None:
        dist.all_reduce(x)
    else:
        near.add_up([x])


def _neighbours() -> Neighbours | None:
    """Those of the present process group; it is asked once whether its processes share a machine."""
    group = dist.group.WORLD
    if group not in _met:
        _met[group] = near = meet()
        if near is not None:
            weakref.finalize(group, near.close)
    return _met[group]


_met: weakref.WeakKeyDictionary[Any, Neighbours | None] = weakref.WeakKeyDictionary()  # they end with their group


def shares_memory(model: nn.Module) -> bool:
    """Whether the processes of this run train `model` on the CPU of one machine, each with all of its weights."""
    near = world()[1] > 1 and all(parameter.device.type == "cpu" for parameter in model.parameters())
    return near and _neighbours() is not None


def add_up_gradients(model: nn.Module) -> None:
    """Replace every gradient by its sum over all processes, which share memory.

    In place of DistributedDataParallel: no copy into buckets and back, and the processes wait for each other once.
    """
    near = _neighbours()
    assert near is not None
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = [gradient.contiguous() for gradient in gradients]
    near.add_up(flat)
    for gradient, total in zip(gradients, flat, strict=True):
        if gradient is not total:  # in the order of channels_last, which the optimiser relies on
            gradient.copy_(total)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of `x` over all processes, on each of them; gradients are summed likewise.

    A loss that is a function of such sums has, once the training loop has averaged the gradients over the processes,
    exactly the gradient of the same loss on the whole batch.
    """
    if world()[1] == 1:
        return x
    total: Tensor = _SumOverRanks.apply(x)  # type: ignore[no-untyped-call]
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        add_up(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        add_up(total)
        return total


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of `x` over all processes, without gradient."""
    size = world()[1]
    if size == 1:
        return x
    total = x.detach().clone(memory_format=torch.contiguous_format)
    add_up(total)
    return total / size

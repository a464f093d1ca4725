"""What must be summed over all processes so that two of them compute what one would."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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
        near.add_up(x)


def _neighbours() -> Neighbours | None:
    """Those of the present process group; it is asked once whether its processes share a machine."""
    group = dist.group.WORLD
    if _met["group"]() is not group:
        _met.update(group=weakref.ref(group), found=meet())
    found: Neighbours | None = _met["found"]
    return found


_met: dict[str, Any] = {"group": lambda: None, "found": None}


def share_gradients(wrapped: nn.Module, *, buffers: bool) -> None:
    """Let DistributedDataParallel average gradients by `add_up`, where the processes share a machine; in place.

    Args:
        wrapped: Left alone when it is anything else.
        buffers: Whether every step must begin with the buffers of rank 0: where a process has some of its own.
    """
    if not isinstance(wrapped, DistributedDataParallel):
        return
    wrapped.forward_sync_buffers = buffers
    on_cpu = all(parameter.device.type == "cpu" for parameter in wrapped.parameters())
    if on_cpu and _neighbours() is not None:
        wrapped.register_comm_hook(None, _averaged)


def _averaged(_: None, bucket: Any) -> torch.futures.Future[Tensor]:
    """A communication hook."""
    gradient = bucket.buffer()
    add_up(gradient)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradient.div_(world()[1]))
    return done


# torch compares the annotations of a hook with types, and here they are names.
_averaged.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}  # type: ignore[attr-defined]


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

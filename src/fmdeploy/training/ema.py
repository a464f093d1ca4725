"""Averaged weights: an exponential moving average of everything a network's state holds, or of another's.

Every slow copy in the project moves by `follow`: averaged weights, the targets of JEPA and of self-distillation. A
module with a true attribute `never_averaged` is copied instead: one that another module learned to read as it is, such
as the tokeniser of a world model.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from fmdeploy.training.sharding import mine


@torch.no_grad()
def follow(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], keep: float, averaged: Container[str]) -> None:
    """Move, in place, ours ← keep · ours + (1 - keep) · theirs (arXiv:1911.05722, equation 2).

    Args:
        ours: Tensors of the slow copy by name.
        theirs: Those it follows, by the same names.
        keep: Weight of the past.
        averaged: Names of those that move so; the others, such as counters, are copied.
    """
    moving = [name for name in ours if name in averaged]
    for name, value in ours.items():
        if name not in averaged:
            value.copy_(theirs[name])
    torch._foreach_lerp_([ours[name] for name in moving], [theirs[name] for name in moving], 1 - keep)


def floating(state: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of the tensors that can be averaged."""
    return frozenset(name for name, value in state.items() if value.is_floating_point())


class WeightAverage:
    """Moving average of parameters and of floating-point buffers such as BatchNorm's statistics.

    Args:
        model: The network that is trained; its present state is the first average.
        decay: Weight of the past. Early on it is (1 + t) / (10 + t), so that the start is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}
        copied = tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "never_averaged", False))
        self._averaged = frozenset(name for name in floating(self.values) if not name.startswith(copied))

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the state after `step` (0 for the first)."""
        ours, theirs = ({name: mine(value) for name, value in state.items()}
                        for state in (self.values, model.state_dict()))
        follow(ours, theirs, min(self.decay, (1 + step) / (10 + step)), self._averaged)

    def copy_to(self, model: nn.Module) -> None:
        """Put the average into `model`."""
        model.load_state_dict(self.values)

"""Averaged weights: an exponential moving average of everything a network's state holds.

A module with a true attribute `never_averaged` is copied instead: one that another module learned to read as it is,
such as the tokeniser of a world model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmdeploy.training.sharding import mine


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
        self._averaged = frozenset(
            name for name, value in self.values.items() if value.is_floating_point() and not name.startswith(copied))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the state after `step` (0 for the first)."""
        keep = min(self.decay, (1 + step) / (10 + step))
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        for name, value in model.state_dict().items():
            if name in self._averaged:
                ours.append(mine(self.values[name]))
                theirs.append(mine(value))
            else:
                mine(self.values[name]).copy_(mine(value))
        torch._foreach_lerp_(ours, theirs, 1 - keep)

    def copy_to(self, model: nn.Module) -> None:
        """Put the average into `model`."""
        model.load_state_dict(self.values)

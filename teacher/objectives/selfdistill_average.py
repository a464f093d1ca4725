"""A slowly moving copy of a module: the teacher of self-distillation, the key encoder of MoCo.

It is part of the objective, hence of every checkpoint, and is never trained by gradients.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from fmdeploy.training.ema import floating, follow


class MovingCopy(nn.Module):
    """An exponential moving average of a module, in evaluation mode and without gradients.

    Args:
        source: What is followed; its present weights are the first average.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(source).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MovingCopy:
        """Set its own flag only: dropout and batch statistics have no place in a target."""
        self.training = mode
        return self

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """What the average makes of `inputs`, without gradient."""
        return self.module(*inputs)

    def follow(self, source: nn.Module, keep: float) -> None:
        """Move by `1 - keep` of the way to `source`; counters are copied."""
        state = self.module.state_dict()
        follow(state, source.state_dict(), keep, floating(state))


def rising(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at the last of `steps` (arXiv:2006.07733, section 3.2)."""
    share = min(1.0, step / max(1, steps - 1))
    return end - (end - start) * 0.5 * (1 + math.cos(math.pi * share))

"""The straight path of flow matching from noise to data, and how to walk it.

Legend: B examples, `...` any shape of one example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Method = Literal["euler", "heun"]
Field = Callable[[Tensor, Tensor], Tensor]


def on_path(x0: Tensor, x1: Tensor, t_B: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The point at time t and the velocity there (arXiv:2210.02747, equations 20 to 23).

        x_t = (1 - (1 - σ) t) x0 + t x1        u = x1 - (1 - σ) x0

    Args:
        x0: (B, ...) standard normal noise.
        x1: (B, ...) data.
        t_B: (B,) times in [0, 1].
        sigma: σ, the spread that is left around the data at t = 1.
    """
    t = t_B.view(-1, *(1,) * (x1.ndim - 1))
    return (1 - (1 - sigma) * t) * x0 + t * x1, x1 - (1 - sigma) * x0


def walk(field: Field, noise: Tensor, *, steps: int, method: Method = "heun") -> Tensor:
    """Solve dx/dt = field(x, t) from t = 0 to 1 in equal steps; deterministic for given noise.

    Args:
        field: Velocity (B, ...) at points (B, ...) and times (B,).
        noise: (B, ...) where the paths begin.
        steps: Of the solver.
        method: `euler` calls the field once a step; `heun` twice, with an error of second order.
    """
    x = noise
    for step in range(steps):
        t_B = x.new_full((len(x),), step / steps)
        slope = field(x, t_B)
        if method == "heun":
            slope = (slope + field(x + slope / steps, t_B + 1 / steps)) / 2
        x = x + slope / steps
    return x


def noise_like(shape: tuple[int, ...], *, seed: int, device: torch.device) -> Tensor:
    """Standard normal numbers that are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device)

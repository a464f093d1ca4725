"""Learning rate over the steps, and which parameters decay."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fmdeploy.training.config import TrainingConfig

BETAS = (0.9, 0.98)
FLOOR = 0.01  # share of the peak rate that the last step still has


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then half a cosine down to 1 % of the peak (arXiv:1608.03983).

    Args:
        step: 0 for the first step.
        config: `steps`, `warmup` (a share of them) and the peak `lr`.
    """
    rising = round(config.warmup * config.steps)
    if step < rising:
        return config.lr * (step + 1) / rising
    progress = (step - rising) / max(1, config.steps - 1 - rising)
    return config.lr * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases, norms and other vectors do not (arXiv:1711.05101)."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in wanted if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in wanted if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`, in one fused kernel."""
    return torch.optim.AdamW(decay_groups(model, config.weight_decay), lr=config.lr, betas=BETAS, fused=True)

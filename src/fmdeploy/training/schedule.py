"""Learning rate over the steps, and which parameters decay."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fmdeploy.errors import ConfigError
from fmdeploy.training.config import TrainingConfig

BACKBONE = "backbone"
BETAS = (0.9, 0.98)
FLOOR = 0.01  # share of the peak rate that the last step still has


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then down to 1 % of the peak along half a cosine (arXiv:1608.03983) or a line; or not.

    Args:
        step: 0 for the first step.
        config: `steps`, `warmup` (a share of them), `schedule` and the peak `lr`.
    """
    rising = round(config.warmup * config.steps)
    if step < rising:
        return config.lr * (step + 1) / rising
    progress = (step - rising) / max(1, config.steps - 1 - rising)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "linear":
        return config.lr * (FLOOR + (1 - FLOOR) * (1 - progress))
    return config.lr * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases, norms and other vectors do not (arXiv:1711.05101)."""
    return _groups([p for p in model.parameters() if p.requires_grad], weight_decay, 1.0)


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """The decay groups; those of the backbone apart where it has a rate of its own (`scale` times the others').

    Raises:
        ConfigError: the backbone is to have its own rate, and no module of `model` is called so.
    """
    if config.backbone_lr == 1:
        return decay_groups(model, config.weight_decay)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inside = {name for name in wanted if BACKBONE in name.split(".")[:-1]}
    if not inside:
        raise ConfigError("no trained module is called 'backbone'", where="backbone_lr", found=config.backbone_lr,
                          fix="Leave --backbone-lr out")
    below, others = [p for n, p in wanted.items() if n in inside], [p for n, p in wanted.items() if n not in inside]
    return _groups(below, config.weight_decay, config.backbone_lr) + _groups(others, config.weight_decay, 1.0)


def _groups(parameters: list[nn.Parameter], weight_decay: float, scale: float) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay, "scale": scale},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "scale": scale},
    ]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`, in one fused kernel."""
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, betas=BETAS, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of `optimizer` the rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]

"""Activation checkpointing (arXiv:1604.06174): forget what a block computed, and compute it again in the backward pass.

A network that can do it has modules with a bool attribute `activation_checkpointing`, which they read in every forward
pass. The results are the same; only memory and time differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fmdeploy.errors import ConfigError

SWITCH = "activation_checkpointing"


def checkpoint_activations(network: nn.Module, wanted: bool | None) -> None:
    """Switch it on or off in a network that was built before, in place; None leaves it as it is.

    Raises:
        ConfigError: it is wanted, and no part of the network can.
    """
    able = [module for module in network.modules() if isinstance(getattr(module, SWITCH, None), bool)]
    if wanted and not able:
        raise ConfigError("no part of this network can recompute its activations", where=SWITCH,
                          found=type(network).__name__, fix=f"Leave it out, or give its modules an attribute {SWITCH}")
    for module in able if wanted is not None else ():
        setattr(module, SWITCH, wanted)


def run(block: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """`block(*inputs)`; with `recompute` only its inputs are kept for the backward pass, where there will be one."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)

"""Low-rank updates of layers: the one place that talks to `peft`.

A layer W becomes W + (alpha / r) B A with A (r, in) random and B (out, r) zero (arXiv:2106.09685, section 4.1); of a
convolution, A is a convolution to r channels and B a 1 x 1 one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fmdeploy.errors import ConfigError
from fmdeploy.models.transformer import plain_linear
from fmdeploy.optional import require


def add_lora(teacher: nn.Module, *, rank: int, alpha: float, convolutions: bool, targets: Sequence[str]) -> None:
    """Wrap layers of the teacher, in place; only the updates want a gradient afterwards.

    Args:
        teacher: Its own weights stay, below `base_layer`.
        rank: r.
        alpha: See the top of this file.
        convolutions: Whether plain convolutions are wrapped too.
        targets: Beginnings of the names of the layers; none: every one.

    Raises:
        ConfigError: no layer is called so.
    """
    peft = require("peft")
    layers = [name for name, module in teacher.named_modules()
              if _fits(module, convolutions) and (not targets or _is_below(name, targets))]
    if not layers:
        raise ConfigError("no layer that takes a low-rank update", where="method lora",
                          found=", ".join(targets) or type(teacher).__name__)
    chosen = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, lora_dropout=0.0, bias="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft is told what it is told on purpose
        peft.inject_adapter_in_model(chosen, teacher)
    _keep_dilation(teacher)
    vars(teacher).pop("peft_config", None)  # its note on the network would outlive the merge
    _leave_fast_path(teacher)


def fold_lora(teacher: nn.Module) -> nn.Module:
    """Add every update to the weights it belongs to and take the wrappers off, in place.

    The sum is formed in float64 and rounded once.
    """
    peft = require("peft")
    wrapped = [(name, module) for name, module in teacher.named_modules()
               if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]
    for name, module in wrapped:
        _set(teacher, name, _folded(module))
    return teacher


def _folded(module: Any) -> nn.Module:
    base: nn.Module = module.get_base_layer()
    weight = base.get_parameter("weight")
    kind = weight.dtype
    module.to(dtype=torch.float64)
    module.merge()
    return base.to(kind)


def _keep_dilation(teacher: nn.Module) -> None:
    """`peft` gives the first half of an update the stride and padding of its convolution, but not the dilation."""
    for module in teacher.modules():
        base: Any = getattr(module, "base_layer", None)
        if isinstance(base, nn.Conv2d):
            for first in module.get_submodule("lora_A").children():
                first.dilation = base.dilation  # type: ignore[assignment]


def _set(network: nn.Module, name: str, module: nn.Module) -> None:
    above, _, last = name.rpartition(".")
    setattr(network.get_submodule(above), last, module)


def _fits(module: nn.Module, convolutions: bool) -> bool:
    if next(module.children(), None) is not None:  # a bottleneck was merged here: it must see the sum, not a part of it
        return False
    return plain_linear(module) or (convolutions and type(module) is nn.Conv2d and module.groups == 1)


def _is_below(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.startswith(f"{target}.") for target in targets)


def _leave_fast_path(teacher: nn.Module) -> None:
    """In evaluation torch's own encoder layer reads the weights of its linear layers and would not see the updates."""
    for module in teacher.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0

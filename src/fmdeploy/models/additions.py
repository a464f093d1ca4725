"""Trained parts that a network got after it was built: bottleneck adapters and visual prompts.

They hang below the layer they follow and act through its hooks, so that the network's own names stay as they are and
an old checkpoint still fits. A copy of the network (`copy.deepcopy`) has copies of them: hooks are bound methods.

Legend: B batch, N tokens, P prompts, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from fmdeploy.errors import ConfigError
from fmdeploy.models.transformer import block_ends, transformer_blocks

MOST = 2**16  # wider than any transformer: a larger number in a foreign recipe would take all memory
OPTIONS: dict[str, dict[str, type]] = {"adapter": {"width": int}, "prompt": {"prompts": int, "deep": bool}}


class Addition(BaseModel):
    """What was added, as a recipe says it: an adapter of a `width`, or a number of `prompts`, `deep` or not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["adapter", "prompt"]
    options: dict[str, int | bool]

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Addition:
        wanted = OPTIONS[self.kind]
        if {name: type(value) for name, value in self.options.items()} != wanted:
            said = ", ".join(f"{name} ({kind.__name__})" for name, kind in wanted.items())
            raise ValueError(f"options of {self.kind!r} are {said}")
        if any(type(value) is int and not 1 <= value <= MOST for value in self.options.values()):
            raise ValueError(f"sizes of {self.kind!r} are from 1 to {MOST}")
        return self


class Bottleneck(nn.Module):
    """`x + up(gelu(down(x)))` behind a layer (arXiv:1902.00751, section 2.1); at first it changes nothing.

    Args:
        dim: D.
        width: Of the bottleneck.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        nn.init.normal_(self.down.weight, std=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def after(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Forward hook of the layer (B, N, D)."""
        y: Tensor = output + self.up(F.gelu(self.down(output)))
        return y


class Prompts(nn.Module):
    """Learned tokens that go through the transformer with the picture's (arXiv:2203.12119, equations 4 to 6).

    The paper puts them between class token and picture. Here they stand at the end: positions are added before the
    blocks, and a block without them is blind to order, so that the result is the same.

    Args:
        count: P.
        dim: D.
    """

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.tokens_PD = nn.Parameter(torch.empty(count, dim).normal_(std=0.02))

    def append(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pre-hook of the first block: (B, N, D) to (B, N + P, D)."""
        return self._with(inputs[0], inputs[1:])

    def replace(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pre-hook of a later block: its own prompts in the place of those before."""
        return self._with(inputs[0][:, : -len(self.tokens_PD)], inputs[1:])

    def remove(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Forward hook of the last block: (B, N + P, D) to (B, N, D)."""
        if isinstance(output, tuple):
            return output[0][:, : -len(self.tokens_PD)], *output[1:]
        return output[:, : -len(self.tokens_PD)]

    def _with(self, x_BND: Tensor, others: tuple[Any, ...]) -> tuple[Any, ...]:
        prompts_BPD = self.tokens_PD.to(x_BND.dtype).expand(x_BND.shape[0], -1, -1)
        return torch.cat((x_BND, prompts_BPD), dim=1), *others


def additions_of(network: nn.Module) -> tuple[Addition, ...]:
    """What was added to this network, in order."""
    found: tuple[Addition, ...] = getattr(network, "added", ())
    return found


def add(network: nn.Module, additions: Iterable[Addition]) -> nn.Module:
    """Add parts with fresh weights, in place, and note them at `network.added`.

    Raises:
        ConfigError: the network has no transformer blocks, or has prompts already.
    """
    for addition in additions:
        if addition.kind == "adapter":
            _add_bottlenecks(network, width=int(addition.options["width"]))
        else:
            _add_prompts(network, count=int(addition.options["prompts"]), deep=bool(addition.options["deep"]))
        vars(network)["added"] = (*additions_of(network), addition)
    return network


def _add_bottlenecks(network: nn.Module, *, width: int) -> None:
    for layer in block_ends(network).values():
        part = Bottleneck(layer.out_features, width)
        layer.add_module(_free_name(layer, "adapter"), part)
        layer.register_forward_hook(part.after)


def _add_prompts(network: nn.Module, *, count: int, deep: bool) -> None:
    blocks = list(transformer_blocks(network).values())
    if any(isinstance(module, Prompts) for module in network.modules()):
        raise ConfigError("has prompts already", where=type(network).__name__, fix="Use another --method")
    dim = next(iter(block_ends(network).values())).out_features
    parts = [Prompts(count, dim) for _ in (blocks if deep else blocks[:1])]
    for number, (block, part) in enumerate(zip(blocks, parts, strict=False)):
        block.add_module("prompt", part)
        block.register_forward_pre_hook(part.replace if number else part.append)
    blocks[-1].register_forward_hook(parts[0].remove)


def _free_name(layer: nn.Module, name: str) -> str:
    taken = sum(child.startswith(name) for child, _ in layer.named_children())
    return f"{name}{taken + 1}" if taken else name

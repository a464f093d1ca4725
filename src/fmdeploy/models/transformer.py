"""Finding the transformer inside a network that somebody else wrote."""

from __future__ import annotations

from torch import nn

from fmdeploy.errors import ConfigError

ATTENTION = ("attn", "attention")
ENDS = ("o_proj", "out_proj", "fc2", "linear2", "dense", "proj", "down_proj")
"""Names that libraries give to the layer with which an attention or a perceptron ends."""


def transformer_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks of the deepest stack of attention blocks, by name and in order.

    Raises:
        ConfigError: there is none.
    """
    stacks = [(name, stack) for name, stack in network.named_modules()
              if isinstance(stack, nn.ModuleList) and len(stack) and all(map(_has_attention, stack))]
    if not stacks:
        raise ConfigError("has no transformer blocks to adapt", where=type(network).__name__,
                          expected="a torch.nn.ModuleList of attention blocks", fix="Use --method lora or bias-norm")
    name, stack = max(stacks, key=lambda found: len(found[1]))
    return {f"{name}.{number}": block for number, block in enumerate(stack)}


def block_ends(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that end each attention and each perceptron of the blocks, by name.

    The output projection of `torch.nn.MultiheadAttention` is never called as a module, so it is left out.
    """
    found = {}
    for at, block in transformer_blocks(network).items():
        every = {name: module for name, module in block.named_modules() if plain_linear(module)}
        # What hangs below a layer was added to it (models/additions.py).
        layers = {name: module for name, module in every.items() if not any(name.startswith(f"{n}.") for n in every)}
        width = max((module.in_features for name, module in layers.items() if not _is_end(name)), default=0)
        narrow = min((module.in_features for module in layers.values()), default=width)
        for name, module in layers.items():
            if _is_end(name) and module.out_features == narrow:
                found[f"{at}.{name}"] = module
    return found


def plain_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer that its parent calls (and does not only read the weight of)."""
    return isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _is_end(name: str) -> bool:
    return name.rpartition(".")[2] in ENDS


def _has_attention(block: nn.Module) -> bool:
    return any(word in name.lower() for name, _ in block.named_children() for word in ATTENTION)

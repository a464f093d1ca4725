"""The backbone of the teacher of `bev-occupancy`: a convolutional stem and a DINOv2 vision transformer.

Legend: B batch, C channels, H W cells of the grid (64 x 64), N tokens (8 x 8), K visible ones, D embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fmdeploy.models.blocks import ResidualGN, conv_gn_relu
from fmdeploy.models.recompute import run
from fmdeploy.models.tokens import TokenBackbone
from fmdeploy.models.vit import Dinov2Tokens

GRID = 64  # cells a side
QUARTER = 16  # cells a side at quarter resolution
PATCH = 2  # cells of the quarter map in one token


class Maps(NamedTuple):
    """What the decoder reads."""

    half_BCHW: Tensor
    quarter_BCHW: Tensor
    state_BND: Tensor


class BevBackbone(TokenBackbone):
    """Both sensors' grids to hidden states of 8 x 8 tokens, each of 8 x 8 cells.

    Args:
        num_channels: Channels of all inputs together.
        stem_width: Channels at half resolution.
        width: Channels at quarter resolution.
        dim: Width of the transformer.
        depth: Its blocks.
        heads: Attention heads; must divide `dim`.
        activation_checkpointing: Recompute activations in the backward pass.
    """

    def __init__(
        self, num_channels: int, *, stem_width: int, width: int, dim: int, depth: int, heads: int,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.side, self.patch = dim, QUARTER // PATCH, GRID // (QUARTER // PATCH)
        self.stem_width = stem_width
        self.stem = nn.Sequential(conv_gn_relu(num_channels, stem_width, stride=2), ResidualGN(stem_width))
        self.trunk = nn.Sequential(
            conv_gn_relu(stem_width, width, stride=2), *(ResidualGN(width, dilation) for dilation in (1, 2, 4))
        )
        self.encoder = Dinov2Tokens(width, QUARTER, PATCH, dim, depth, heads,
                                    activation_checkpointing=activation_checkpointing)
        self.activation_checkpointing = activation_checkpointing

    def tokens(self, *inputs: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """See `TokenBackbone.tokens`."""
        return self.maps(*inputs, keep_BK=keep_BK).state_BND

    def maps(self, *inputs: Tensor, keep_BK: Tensor | None = None) -> Maps:
        """The maps at half and quarter resolution, and the hidden states."""
        half_BCHW = self.finest(*inputs)
        quarter_BCHW = self.run(self.trunk, half_BCHW)
        return Maps(half_BCHW, quarter_BCHW, self.encoder(quarter_BCHW, keep_BK))

    def finest(self, *inputs: Tensor) -> Tensor:
        """The map at half resolution; see `TokenBackbone.finest`."""
        return self.run(self.stem, torch.cat(inputs, dim=1))

    @property
    def finest_size(self) -> tuple[int, int]:
        """See `TokenBackbone.finest_size`."""
        return self.stem_width, GRID // 2

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """`block(*inputs)`, recomputed in the backward pass where that is wanted."""
        y: Tensor = run(block, *inputs, recompute=self.activation_checkpointing)
        return y

    forward = tokens

"""The backbone of the teacher of `image-classification`: a convolutional stem and a DINOv2 vision transformer.

Legend: B batch, C channels, H W rows and columns of the image, N tokens, K visible ones, D embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmdeploy.models.blocks import ResidualGN, conv_gn_relu
from fmdeploy.models.recompute import run
from fmdeploy.models.tokens import TokenBackbone
from fmdeploy.models.vit import Dinov2Tokens

TOKENS = 8  # a side, in small images
WIDEST = 16  # pixels of one token, in large ones


class ImageBackbone(TokenBackbone):
    """A square image to hidden states; how many tokens, `tokens_a_side` says.

    Args:
        num_channels: Of the image.
        width: Rows and columns of the image.
        dim: D.
        depth: Blocks of the transformer.
        heads: Attention heads; must divide `dim`.
        activation_checkpointing: Recompute activations in the backward pass.
    """

    def __init__(
        self, num_channels: int, width: int, *, dim: int, depth: int, heads: int,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.side = dim, tokens_a_side(width)
        self.patch = width // self.side
        stride = 2 if self.patch % 2 == 0 else 1
        self.stem = nn.Sequential(conv_gn_relu(num_channels, dim, stride=stride), ResidualGN(dim))
        # As narrow as this, DINOv2's first weights hardly let attention speak: short runs learn less (measured).
        self.encoder = Dinov2Tokens(dim, width // stride, self.patch // stride, dim, depth, heads,
                                    spread=dim**-0.5, activation_checkpointing=activation_checkpointing)
        self.activation_checkpointing = activation_checkpointing

    def tokens(self, *inputs: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """See `TokenBackbone.tokens`."""
        x_BDHW = run(self.stem, torch.cat(inputs, dim=1), recompute=self.activation_checkpointing)
        state_BND: Tensor = self.encoder(x_BDHW, keep_BK)
        return state_BND

    forward = tokens


def tokens_a_side(width: int) -> int:
    """About 8, or as many as make tokens of about 16 pixels, whichever is more; a divisor of `width`.

    Tokens of one pixel are the last resort, for a width that is prime: what fills in a hidden pixel learns little.
    """
    target = max(TOKENS, width / WIDEST)
    sides = [side for side in range(1, width + 1) if width % side == 0]
    fair = [side for side in sides if 1 < side < width] or sides
    return max(fair, key=lambda side: (min(side / target, target / side), side))

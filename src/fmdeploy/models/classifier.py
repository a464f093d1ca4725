"""Networks of `image-classification`: small, for any image size.

Legend: B batch, C channels, H W rows and columns of an image or of its tokens, D embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmdeploy.models.blocks import ResidualBN, conv_bn_relu
from fmdeploy.models.image_backbone import ImageBackbone
from fmdeploy.models.vit import class_and_grid


class CnnClassifier(nn.Module):
    """A residual student: convolution-BatchNorm-ReLU, two resolutions, one linear layer.

    Args:
        num_in: Image channels.
        num_classes: Length of the logits.
        width: Channels; twice as many at half resolution.
        blocks: Residual blocks at each resolution.
    """

    def __init__(self, num_in: int, num_classes: int, *, width: int = 16, blocks: int = 1) -> None:
        super().__init__()
        self.rebuild = ("cnn", {"width": width, "blocks": blocks})
        self.stem = conv_bn_relu(num_in, width)
        self.fine = nn.Sequential(*(ResidualBN(width) for _ in range(blocks)))
        self.down = conv_bn_relu(width, 2 * width, stride=2)
        self.trunk = nn.Sequential(*(ResidualBN(2 * width) for _ in range(blocks)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, classes) of float images (B, C, H, W)."""
        x_BCHW = self.trunk(self.down(self.fine(self.stem(image_BCHW))))
        logits_BC: Tensor = self.head(torch.flatten(self.pool(x_BCHW), 1))
        return logits_BC


class TransformerClassifier(nn.Module):
    """A teacher: a backbone of tokens that can be pre-trained, and one linear layer.

    Args:
        num_in: Image channels.
        num_classes: Length of the logits.
        side: Rows and columns of the image.
        dim: Width of the transformer.
        depth: Its blocks.
        heads: Attention heads; must divide `dim`.
        activation_checkpointing: Recompute activations in the backward pass.
    """

    def __init__(
        self, num_in: int, num_classes: int, side: int, *, dim: int, depth: int, heads: int,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.rebuild = ("", {"dim": dim, "depth": depth, "heads": heads,
                             "activation_checkpointing": activation_checkpointing})
        self.backbone = ImageBackbone(num_in, side, dim=dim, depth=depth, heads=heads,
                                      activation_checkpointing=activation_checkpointing)
        self.tokens = nn.Identity()  # a name for the feature loss to hook: (B, D, tokens a side, tokens a side)
        self.head = nn.Linear(2 * dim, num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, classes) of float images (B, C, H, W), from the class token and the mean of the others."""
        class_BD, grid_BDHW = class_and_grid(self.backbone.tokens(image_BCHW), self.backbone.side)
        logits_BC: Tensor = self.head(torch.cat((class_BD, self.tokens(grid_BDHW).mean((2, 3))), dim=1))
        return logits_BC

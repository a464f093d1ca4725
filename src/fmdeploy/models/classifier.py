"""Networks of `image-classification`: small, for any image size.

Legend: B batch, C channels, H W rows and columns, D embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmdeploy.models.blocks import ResidualBN, ResidualGN, conv_bn_relu, conv_gn_relu


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
    """A teacher: a convolutional stem to half resolution, then a transformer encoder over its cells.

    Args:
        num_in: Image channels.
        num_classes: Length of the logits.
        side: Rows and columns of the image; even.
        dim: Width of the transformer.
        depth: Its blocks.
        heads: Attention heads; must divide `dim`.
    """

    def __init__(self, num_in: int, num_classes: int, side: int, *, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.rebuild = ("", {"dim": dim, "depth": depth, "heads": heads})
        self.stem = nn.Sequential(conv_gn_relu(num_in, dim, stride=2), ResidualGN(dim))
        cells = ((side + 1) // 2) ** 2
        self.position = nn.Parameter(torch.zeros(1, cells, dim).normal_(std=0.02))
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.tokens = nn.Identity()  # a name for the feature loss to hook: (B, D, H / 2, W / 2)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, classes) of float images (B, C, H, W)."""
        x_BDHW = self.stem(image_BCHW)
        state_BND = self.encoder(x_BDHW.flatten(2).transpose(1, 2) + self.position)
        grid_BDHW = self.tokens(state_BND.transpose(1, 2).unflatten(2, x_BDHW.shape[2:]))
        logits_BC: Tensor = self.head(self.norm(grid_BDHW.mean((2, 3))))
        return logits_BC

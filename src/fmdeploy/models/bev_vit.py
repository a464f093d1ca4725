"""A small vision transformer as student of `bev-occupancy`, for those who deploy transformers.

Legend: B batch, C channels, H W cells of the grid (64 x 64), N tokens, D embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmdeploy.models.blocks import conv_bn_relu
from fmdeploy.models.vit import Dinov2Tokens, class_and_grid

HALF = 32  # cells a side at half resolution
PATCH = 4  # cells of the half map in one token


class BevVit(nn.Module):
    """A stride-2 convolution, a DINOv2 encoder on 8 x 8 tokens, and a skip to full detail.

    Args:
        channels: Channels of each input, in order.
        num_planes: Planes of the `bev` output.
        num_scenes: Length of the `scene` output.
        width: Channels at half resolution.
        dim: Width of the transformer.
        depth: Its blocks.
    """

    def __init__(
        self, channels: tuple[int, ...], num_planes: int, num_scenes: int, *,
        width: int = 32, dim: int = 64, depth: int = 2,
    ) -> None:
        super().__init__()
        self.rebuild = ("vit", {"width": width, "dim": dim, "depth": depth})
        self.stem = conv_bn_relu(sum(channels), width, stride=2)
        self.encoder = Dinov2Tokens(width, HALF, PATCH, dim, depth, 2)
        self.trunk = nn.Identity()  # a name for the feature loss to hook: (B, D, 8, 8)
        self.lateral = nn.Conv2d(dim, width, 1)
        self.rise = nn.Upsample(scale_factor=PATCH, mode="nearest")
        self.refine = conv_bn_relu(width, width)
        self.head = nn.Sequential(nn.Conv2d(width, 4 * num_planes, 3, padding=1), nn.PixelShuffle(2))
        self.scene = nn.Linear(dim, num_scenes)

    def forward(self, lidar_BCHW: Tensor, camera_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `bev` (B, planes, 64, 64) and `scene` (B, scenes) from float grids (B, C, 64, 64)."""
        half_BCHW = self.stem(torch.cat((lidar_BCHW, camera_BCHW), dim=1))
        scene_BD, grid_BDHW = class_and_grid(self.encoder(half_BCHW), HALF // PATCH)
        up_BCHW = self.rise(self.lateral(self.trunk(grid_BDHW)))
        return self.head(self.refine(half_BCHW + up_BCHW)), self.scene(scene_BD)

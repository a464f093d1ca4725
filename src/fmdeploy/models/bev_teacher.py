"""The teacher of `bev-occupancy`: a convolutional stem, a DINOv2 vision transformer, a U-Net decoder.

A plain patch-8 ViT trained from scratch on a few thousand frames learns less than the student; strided
convolutions in front of it and skips around it are what makes a teacher of it (measured, see docs).

Legend: B batch, C channels, H W cells of the grid (64 x 64), N tokens (8 x 8), D embedding.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fmdeploy.models.bev_backbone import BevBackbone
from fmdeploy.models.blocks import ResidualGN, conv_gn_relu
from fmdeploy.models.vit import class_and_grid


class BevTeacherConfig(BaseModel):
    """Sizes of the teacher. The defaults make 2.2 M parameters; bf16 kernels like widths in multiples of 32."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: int = Field(default=208, ge=8, description="width of the vision transformer")
    depth: int = Field(default=3, ge=1, description="blocks of the vision transformer")
    heads: int = Field(default=4, ge=1, description="attention heads; must divide `dim`")
    stem_width: int = Field(default=32, ge=8, multiple_of=8, description="channels at half resolution")
    width: int = Field(default=64, ge=8, multiple_of=8, description="channels at quarter resolution")
    activation_checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")


class BevTeacher(nn.Module):
    """From the two sensors' grids to occupancy and drivable logits, and a scene label.

    Args:
        channels: Channels of each input, in order.
        num_planes: Planes of the `bev` output.
        num_scenes: Length of the `scene` output.
        config: Sizes.
    """

    def __init__(self, channels: tuple[int, ...], num_planes: int, num_scenes: int, config: BevTeacherConfig) -> None:
        super().__init__()
        self.rebuild = ("", config.model_dump())
        stem, width, dim = config.stem_width, config.width, config.dim
        self.backbone = BevBackbone(
            sum(channels), stem_width=stem, width=width, dim=dim, depth=config.depth, heads=config.heads,
            activation_checkpointing=config.activation_checkpointing,
        )
        self.tokens = nn.Identity()  # a name for the feature loss to hook: (B, D, 8, 8)
        self.rise = nn.Sequential(nn.Conv2d(dim, 4 * width, 1), nn.PixelShuffle(2))
        self.join_quarter = nn.Sequential(conv_gn_relu(2 * width, width), ResidualGN(width))
        self.join_half = nn.Sequential(conv_gn_relu(width + stem, stem), ResidualGN(stem))
        self.head = nn.Sequential(nn.Conv2d(stem, 4 * num_planes, 3, padding=1), nn.PixelShuffle(2))
        self.scene = nn.Linear(dim, num_scenes)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, lidar_BCHW: Tensor, camera_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `bev` (B, planes, 64, 64) and `scene` (B, scenes) from float grids (B, C, 64, 64)."""
        half_BCHW, quarter_BCHW, state_BND = self.backbone.maps(lidar_BCHW, camera_BCHW)
        scene_BD, grid_BDHW = class_and_grid(state_BND, self.backbone.side)
        run = self.backbone.run
        risen_BCHW = self.rise(self.tokens(grid_BDHW))
        up_BCHW = run(self.join_quarter, torch.cat((risen_BCHW, quarter_BCHW), dim=1))
        top_BCHW = run(self.join_half, torch.cat((self.upsample(up_BCHW), half_BCHW), dim=1))
        return self.head(top_BCHW), self.scene(scene_BD)

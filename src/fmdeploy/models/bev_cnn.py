"""The student of `bev-occupancy`: a residual CNN of convolution, BatchNorm and ReLU.

Every operator has an INT8 kernel in TensorRT and in ONNX Runtime: 3 x 3 and 1 x 1 convolutions, adds, nearest
up-sampling by 2, one transposed convolution, one global average pool and one linear layer. Widths are multiples of 16.

Legend: B batch, C channels, H W cells of the grid (64 x 64).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmdeploy.models.blocks import ResidualBN, conv_bn_relu


class BevCnn(nn.Module):
    """From the two sensors' grids to occupancy and drivable logits, and a scene label.

    Args:
        channels: Channels of each input, in order.
        num_planes: Planes of the `bev` output.
        num_scenes: Length of the `scene` output.
        stem_width: Channels at half resolution.
        width: Channels at quarter resolution.
        dilations: One residual block at quarter resolution for each.
    """

    def __init__(
        self, channels: tuple[int, ...], num_planes: int, num_scenes: int, *,
        stem_width: int = 48, width: int = 48, dilations: tuple[int, ...] = (1, 2),
    ) -> None:
        super().__init__()
        self.rebuild = ("cnn", {"stem_width": stem_width, "width": width, "dilations": list(dilations)})
        self.stem = nn.Sequential(conv_bn_relu(sum(channels), stem_width, stride=2), ResidualBN(stem_width))
        self.trunk = nn.Sequential(
            conv_bn_relu(stem_width, width, stride=2), *(ResidualBN(width, dilation) for dilation in dilations)
        )
        self.lateral = conv_bn_relu(width, stem_width, kernel=1)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.relu = nn.ReLU()
        self.refine = ResidualBN(stem_width)
        # The same function as a 1 x 1 convolution and PixelShuffle, in one kernel: the head stays in float, and a
        # 3 x 3 head with PixelShuffle took a third of the INT8 network's time in ONNX Runtime (measured).
        self.head = nn.ConvTranspose2d(stem_width, num_planes, 2, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.scene = nn.Linear(width, num_scenes)

    def forward(self, lidar_BCHW: Tensor, camera_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `bev` (B, planes, 64, 64) and `scene` (B, scenes) from float grids (B, C, 64, 64)."""
        half_BCHW = self.stem(torch.cat((lidar_BCHW, camera_BCHW), dim=1))
        quarter_BCHW = self.trunk(half_BCHW)
        up_BCHW = self.upsample(self.lateral(quarter_BCHW))
        bev_BCHW = self.head(self.refine(self.relu(half_BCHW + up_BCHW)))
        scene_BC = self.scene(torch.flatten(self.pool(quarter_BCHW), 1))
        return bev_BCHW, scene_BC

"""Depthwise-separable students: few operations, and hard to quantise.

A block widens with a 1 x 1 convolution, filters every channel on its own, weighs the channels by their global mean, and
narrows again without an activation (MobileNetV2, arXiv:1801.04381; with SiLU and squeeze-and-excitation as in
EfficientNet, arXiv:1905.11946). For its size it is the most accurate student here, at high learning rates. But SiLU has
no upper end and puts half of what it says into -0.28 … 0: a tensor's largest value is tens of times its typical one,
and one INT8 scale a tensor leaves few steps for the rest. Plain max PTQ of such a network loses accuracy that dense
networks and ReLU6 keep (arXiv:2004.09602 finds the same of EfficientNet); training on the grid brings it back.

Legend: B batch, C channels, H W rows and columns of the map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu6": nn.ReLU6, "silu": nn.SiLU}
SQUEEZE, NARROWEST = 4, 8


def _conv_bn_act(
    num_in: int, num_out: int, activation: str, *, kernel: int = 3, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Sequential:
    pad = dilation * (kernel // 2)
    conv = nn.Conv2d(num_in, num_out, kernel, stride, pad, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(num_out), ACTIVATIONS[activation]())


class SqueezeExcite(nn.Module):
    """Weighs every channel between 0 and 1 by what all channels are on average (arXiv:1709.01507)."""

    def __init__(self, channels: int, narrow: int, activation: str) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(channels, narrow, 1)
        self.act = ACTIVATIONS[activation]()
        self.excite = nn.Conv2d(narrow, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        weight_BC11: Tensor = self.gate(self.excite(self.act(self.squeeze(self.pool(x_BCHW)))))
        return x_BCHW * weight_BC11


class InvertedResidual(nn.Module):
    """1 x 1 up, depthwise 3 x 3, squeeze-and-excite, 1 x 1 down; added to its input where the shapes allow it.

    Args:
        num_in: Channels in.
        num_out: Channels out.
        expand: Widening factor.
        stride: Of the depthwise convolution.
        dilation: Of the depthwise convolution.
        activation: A key of `ACTIVATIONS`.
    """

    def __init__(
        self, num_in: int, num_out: int, *, expand: int = 4, stride: int = 1, dilation: int = 1,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        wide = expand * num_in
        self.widen = _conv_bn_act(num_in, wide, activation, kernel=1)
        self.filter = _conv_bn_act(wide, wide, activation, stride=stride, dilation=dilation, groups=wide)
        self.weigh = SqueezeExcite(wide, max(NARROWEST, num_in // SQUEEZE), activation)
        self.narrow = nn.Sequential(nn.Conv2d(wide, num_out, 1, bias=False), nn.BatchNorm2d(num_out))
        self.residual = stride == 1 and num_in == num_out

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, num_out, H / stride, W / stride)`."""
        y_BCHW: Tensor = self.narrow(self.weigh(self.filter(self.widen(x_BCHW))))
        return x_BCHW + y_BCHW if self.residual else y_BCHW


class BevDepthwise(nn.Module):
    """From the two sensors' grids to occupancy and drivable logits, and a scene label, in depthwise blocks.

    Args:
        channels: Channels of each input, in order.
        num_planes: Planes of the `bev` output.
        num_scenes: Length of the `scene` output.
        stem_width: Channels at half resolution.
        width: Channels at quarter resolution.
        expand: Widening factor of the blocks.
        dilations: One block at quarter resolution for each.
        activation: A key of `ACTIVATIONS`.
    """

    def __init__(
        self, channels: tuple[int, ...], num_planes: int, num_scenes: int, *, stem_width: int = 16, width: int = 32,
        expand: int = 4, dilations: tuple[int, ...] = (1, 2, 4, 1, 2), activation: str = "silu",
    ) -> None:
        super().__init__()
        sizes = {"stem_width": stem_width, "width": width, "expand": expand, "dilations": list(dilations)}
        self.rebuild = ("depthwise", {**sizes, "activation": activation})
        self.stem = nn.Sequential(
            _conv_bn_act(sum(channels), stem_width, activation, stride=2),
            InvertedResidual(stem_width, stem_width, expand=expand, activation=activation),
        )
        self.trunk = nn.Sequential(
            InvertedResidual(stem_width, width, expand=expand, stride=2, activation=activation),
            *(InvertedResidual(width, width, expand=expand, dilation=d, activation=activation) for d in dilations),
        )
        self.lateral = nn.Sequential(nn.Conv2d(width, stem_width, 1, bias=False), nn.BatchNorm2d(stem_width))
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.refine = InvertedResidual(stem_width, stem_width, expand=expand, activation=activation)
        self.head = nn.ConvTranspose2d(stem_width, num_planes, 2, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.scene = nn.Linear(width, num_scenes)

    def forward(self, lidar_BCHW: Tensor, camera_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `bev` (B, planes, 64, 64) and `scene` (B, scenes) from float grids (B, C, 64, 64)."""
        half_BCHW = self.stem(torch.cat((lidar_BCHW, camera_BCHW), dim=1))
        quarter_BCHW = self.trunk(half_BCHW)
        up_BCHW = self.upsample(self.lateral(quarter_BCHW))
        bev_BCHW = self.head(self.refine(half_BCHW + up_BCHW))
        scene_BC = self.scene(torch.flatten(self.pool(quarter_BCHW), 1))
        return bev_BCHW, scene_BC


class DepthwiseClassifier(nn.Module):
    """An image classifier of depthwise blocks at two resolutions and one linear layer.

    Args:
        num_in: Image channels.
        num_classes: Length of the logits.
        width: Channels; twice as many at half resolution.
        blocks: Blocks at half resolution.
        expand: Widening factor of the blocks.
        activation: A key of `ACTIVATIONS`.
    """

    def __init__(
        self, num_in: int, num_classes: int, *, width: int = 16, blocks: int = 2, expand: int = 4,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        sizes = {"width": width, "blocks": blocks, "expand": expand, "activation": activation}
        self.rebuild = ("depthwise", sizes)
        self.stem = _conv_bn_act(num_in, width, activation)
        self.fine = InvertedResidual(width, width, expand=expand, activation=activation)
        self.down = InvertedResidual(width, 2 * width, expand=expand, stride=2, activation=activation)
        self.trunk = nn.Sequential(
            *(InvertedResidual(2 * width, 2 * width, expand=expand, activation=activation) for _ in range(blocks))
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, classes) of float images (B, C, H, W)."""
        x_BCHW = self.trunk(self.down(self.fine(self.stem(image_BCHW))))
        logits_BC: Tensor = self.head(torch.flatten(self.pool(x_BCHW), 1))
        return logits_BC

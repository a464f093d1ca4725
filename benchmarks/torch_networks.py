"""ResNet-18 (arXiv:1512.03385) and ViT-S/16 (arXiv:2010.11929, 2012.12877) in plain torch, with random weights.

Not the zero-initialised last BatchNorm of each block: its residual branch would be silent and quantise for free.
Legend: B batch, C channels, H W rows and columns, N tokens, D embedding, A heads.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy.iospec import IOSpec, TensorSpec

SIDE = 224
CLASSES = 1000


def image_io(value_range: tuple[float, float] | None = (-3.0, 3.0)) -> IOSpec:
    """One normalised image in, 1000 logits out."""
    image = TensorSpec(name="image", shape=(3, SIDE, SIDE), layout="CHW", value_range=value_range)
    return IOSpec(inputs=(image,), outputs=(TensorSpec(name="logits", shape=(CLASSES,)),), preprocessing="none")


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or num_in != num_out:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        y_BCHW = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x_BCHW)))))
        return F.relu(y_BCHW + self.shortcut(x_BCHW))


class ResNet18(nn.Module):
    """11.69 million parameters, 1.81 GMAC at 224 x 224."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
                                  nn.MaxPool2d(3, 2, 1))
        widths = (64, 64, 128, 256, 512)
        self.blocks = nn.Sequential(*(
            nn.Sequential(BasicBlock(a, b, 1 if a == b else 2), BasicBlock(b, b, 1))
            for a, b in pairwise(widths)
        ))
        self.head = nn.Linear(512, CLASSES)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, 1000) of images (B, 3, 224, 224)."""
        logits_BC: Tensor = self.head(self.blocks(self.stem(image_BCHW)).mean((2, 3)))
        return logits_BC


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Map (B, N, D) to the same shape."""
        batch, tokens, dim = x_BND.shape
        qkv = self.qkv(x_BND).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        y_BAND = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        y_BND: Tensor = self.out(y_BAND.transpose(1, 2).reshape(batch, tokens, dim))
        return y_BND


class VitBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x_BND: Tensor) -> Tensor:
        """Map (B, N, D) to the same shape."""
        x_BND = x_BND + self.attention(self.norm1(x_BND))
        y_BND: Tensor = x_BND + self.mlp(self.norm2(x_BND))
        return y_BND


class VitS16(nn.Module):
    """22.0 million parameters, 4.6 GMAC at 224 x 224."""

    def __init__(self, dim: int = 384, depth: int = 12, heads: int = 6, patch: int = 16) -> None:
        super().__init__()
        tokens = (SIDE // patch) ** 2
        self.patch = nn.Conv2d(3, dim, patch, patch)
        self.position_1ND = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.blocks = nn.Sequential(*(VitBlock(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, 1000) of images (B, 3, 224, 224)."""
        x_BND = self.patch(image_BCHW).flatten(2).transpose(1, 2) + self.position_1ND
        logits_BC: Tensor = self.head(self.norm(self.blocks(x_BND)).mean(1))
        return logits_BC

"""A task of small float images whose teacher has a backbone that can be pre-trained: 16 x 16 pixels, 4 x 4 tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.models.tokens import TokenBackbone
from fmdeploy.tasks.image_classification import ImageClassification

SIDE, PATCH, DIM = 4, 4, 16


class PatchBackbone(TokenBackbone):
    """A convolution, patches, one transformer block. `reach` cells of a convolution see across patch borders."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.dim, self.side, self.patch = DIM, SIDE, PATCH
        self.stem = nn.Conv2d(num_channels, 8, 3, padding=1)
        self.embed = nn.Conv2d(8, DIM, PATCH, PATCH)
        self.first = nn.Parameter(torch.randn(1, 1, DIM) * 0.02)
        self.position = nn.Parameter(torch.randn(1, SIDE * SIDE, DIM) * 0.02)
        self.block = nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, 0.0, "gelu", batch_first=True, norm_first=True)

    def tokens(self, *inputs: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        x_BND = self.embed(torch.relu(self.stem(torch.cat(inputs, dim=1)))).flatten(2).transpose(1, 2) + self.position
        if keep_BK is not None:
            x_BND = x_BND.gather(1, keep_BK[..., None].expand(-1, -1, DIM))
        state_BND: Tensor = self.block(torch.cat((self.first.expand(len(x_BND), 1, DIM), x_BND), dim=1))
        return state_BND

    forward = tokens


class PatchClassifier(nn.Module):
    """Classes from the first token."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = PatchBackbone(3)
        self.head = nn.Linear(DIM, num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        logits_BC: Tensor = self.head(self.backbone.tokens(image_BCHW)[:, 0])
        return logits_BC


class TokensTask(ImageClassification):
    """One float image."""

    name = "support.tokens_task:TokensTask"
    image_shape = (3, 16, 16)
    num_classes = 4

    @property
    def io(self) -> IOSpec:
        image = TensorSpec(name="image", shape=self.image_shape, layout="CHW", value_range=(-3.0, 3.0))
        logits = TensorSpec(name="logits", shape=(self.num_classes,), layout="C")
        return IOSpec(inputs=(image,), outputs=(logits,), preprocessing="none")

    def teacher(self, options: Mapping[str, Any]) -> nn.Module:
        return PatchClassifier(self.num_classes)

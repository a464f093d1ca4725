"""Networks as people write them: what each tracer must see through, one thing a network."""

# B batch, C channels, H W rows and columns, N tokens, D embedding

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy.iospec import IOSpec
from fmdeploy.models.bev_vit import BevVit
from support.quantize_nets import io_of, settle

IMAGE = (3, 16, 16)


class Encoder(nn.Module):
    """nn.TransformerEncoder over patches: torch.fx does not look into it."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, stride=4)
        layer = nn.TransformerEncoderLayer(dim, 2, 2 * dim, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        state_BND = self.encoder(self.patch(x_BCHW).flatten(2).transpose(1, 2))
        y_BC: Tensor = self.head(self.norm(state_BND.mean(1)))
        return y_BC


class HuggingFaceViT(nn.Module):
    """transformers' ViT with a linear head."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                        intermediate_size=32, image_size=16, patch_size=4)
        self.vit = transformers.ViTModel(config, add_pooling_layer=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BC: Tensor = self.head(self.vit(pixel_values=x_BCHW).last_hidden_state[:, 0])
        return y_BC


class Star(nn.Module):
    """Takes *inputs and writes in place, returns two outputs, and calls one convolution twice."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.twice, self.norm = nn.Conv2d(6, 8, 3, padding="same"), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.relu, self.planes, self.label = nn.ReLU(inplace=True), nn.Conv2d(8, 2, 1), nn.Linear(8, 3)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x_BCHW = self.norm(self.enter(torch.cat(inputs, 1)))
        self.relu(x_BCHW)
        x_BCHW += self.twice(F.relu(self.twice(x_BCHW), inplace=True))
        x_BCHW = F.max_pool2d(F.relu6(x_BCHW), 2)
        return F.interpolate(self.planes(x_BCHW), scale_factor=2, mode="bilinear"), self.label(x_BCHW.mean((2, 3)))


class Scaled(nn.Module):
    """A layer of the user's own with a functional convolution, and one whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 3, 3, 3) / 5), nn.Parameter(torch.zeros(8))
        self.gain, self.mix = nn.Parameter(torch.ones(8, 8, 1, 1)), nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.relu(F.conv2d(x_BCHW, self.weight, self.bias, padding=1))
        x_BCHW = F.relu(F.conv2d(x_BCHW, weight=torch.tanh(self.gain)))
        return x_BCHW.mean((2, 3)) @ self.mix


class Functional(nn.Module):
    """`Scaled` inside a network, a keyword call, and a linear that shares another's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.tied, self.head = Scaled(), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BC = self.tied(input=self.body(x_BCHW))
        y_BC: Tensor = self.head(F.linear(torch.relu(x_BC), self.tied.weight, self.tied.bias))
        return y_BC


class Bottleneck(nn.Module):
    """A ResNet of two bottleneck blocks with a projected shortcut, as torchvision writes it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True),
                                  nn.MaxPool2d(2))
        self.blocks = nn.ModuleList([self._branch(width), self._branch(width)])
        self.short = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.relu, self.pool, self.fc = nn.ReLU(True), nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(width, 4)

    @staticmethod
    def _branch(width: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for kernel in (1, 3, 1):
            layers += [nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(width),
                       nn.ReLU(True)]
        return nn.Sequential(*layers[:-1])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.stem(x_BCHW)
        out_BCHW = self.blocks[0](x_BCHW)
        out_BCHW += self.short(x_BCHW)
        x_BCHW = self.relu(out_BCHW)
        x_BCHW = self.relu(self.blocks[1](x_BCHW) + x_BCHW)
        y_BC: Tensor = self.fc(torch.flatten(self.pool(x_BCHW), 1))
        return y_BC


def bev_vit() -> tuple[nn.Module, IOSpec]:
    """The built-in transformer student on its real grid, narrow."""
    torch.manual_seed(0)
    io = io_of((8, 64, 64), (12, 64, 64), outputs=((5, 64, 64), (8,)))
    return settle(BevVit((8, 12), 5, 8, width=16, dim=16), io), io


def image(make: type[nn.Module], *inputs: tuple[int, ...], outputs: Any = ((4,),)) -> tuple[nn.Module, IOSpec]:
    """A network of images with settled BatchNorms, and its specification."""
    torch.manual_seed(0)
    io = io_of(*(inputs or (IMAGE,)), outputs=outputs)
    return settle(make(), io), io


def star() -> tuple[nn.Module, IOSpec]:
    """`Star` with two inputs and two outputs."""
    return image(Star, IMAGE, IMAGE, outputs=((2, 16, 16), (3,)))

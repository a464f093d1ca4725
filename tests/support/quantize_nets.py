"""Networks that never heard of fmdeploy, each with one thing that quantisation must get right."""

# B batch, C channels, H W rows and columns, N tokens, D embedding

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.models.bev_cnn import BevCnn
from fmdeploy.quantize.calibrate import CalibrationSet
from fmdeploy.task import Arrays

SIZE = 16


def io_of(*shapes: tuple[int, ...], outputs: tuple[tuple[int, ...], ...], positive: bool = True) -> IOSpec:
    """Inputs `x0`, `x1`, … and outputs `y0`, `y1`, … of these shapes."""
    limits = (0.0, 1.0) if positive else None
    return IOSpec(
        inputs=tuple(TensorSpec(name=f"x{i}", shape=s, value_range=limits) for i, s in enumerate(shapes)),
        outputs=tuple(TensorSpec(name=f"y{i}", shape=s) for i, s in enumerate(outputs)),
        preprocessing="none",
    )


def samples_of(io: IOSpec, count: int = 6, seed: int = 0) -> CalibrationSet:
    """Uniform noise in the inputs' ranges."""
    rng = np.random.default_rng(seed)
    inputs: Arrays = {}
    for spec in io.inputs:
        low, high = spec.value_range or (-1.0, 1.0)
        inputs[spec.name] = rng.uniform(low, high, (count, *spec.shape)).astype(np.float32)
    return CalibrationSet(tuple(f"s/{i:03d}" for i in range(count)), inputs, "0" * 64, seed)


def settle(net: nn.Module, io: IOSpec, seed: int = 0) -> nn.Module:
    """Give BatchNorm running statistics and weights that are not the initial ones; evaluation mode."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    batch = samples_of(io, 8, seed).tensors([spec.name for spec in io.inputs])
    with torch.no_grad():
        for _ in range(20):
            net.train()(*batch)
    return net.eval()


def bev_student() -> tuple[nn.Module, IOSpec]:
    """The built-in student, narrow, on its real grid."""
    io = io_of((8, 64, 64), (12, 64, 64), outputs=((5, 64, 64), (8,)))
    torch.manual_seed(0)
    return settle(BevCnn((8, 12), 5, 8, stem_width=16, width=16), io), io


class Residual(nn.Module):
    """Conv-BN-ReLU, a residual add, a ReLU, a linear head; activations in place, as people write them."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(channels, 4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.relu(self.bn(self.stem(x_BCHW)), inplace=True)
        x_BCHW = torch.relu_(self.conv(x_BCHW).add_(x_BCHW))
        y_BC: Tensor = self.head(self.drop(x_BCHW.mean((2, 3))))
        return y_BC


class ZeroGamma(nn.Module):
    """A residual branch that ends in a BatchNorm whose scale starts at zero, as ResNets are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.after, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = torch.relu(self.stem(x_BCHW))
        x_BCHW = x_BCHW + torch.relu(self.norm(self.conv(x_BCHW)))
        y_BC: Tensor = self.head(torch.relu(self.after(x_BCHW)).mean((2, 3)))
        return y_BC


class SkipConcat(nn.Module):
    """A concat of an up-sampled and a skipped tensor with very different ranges, behind a max-pool."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.join, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        skip_BCHW = F.relu(self.enter(x_BCHW))
        deep_BCHW = F.relu(self.deep(F.max_pool2d(skip_BCHW, 2))) * 1.0
        up_BCHW = F.interpolate(deep_BCHW, scale_factor=2.0, mode="nearest")
        joined_BCHW = F.relu(self.join(torch.cat([skip_BCHW, up_BCHW], 1)))
        y_BCHW: Tensor = F.pixel_shuffle(self.head(joined_BCHW), 2)
        return y_BCHW


class SmallViT(nn.Module):
    """Patch embedding, one pre-norm attention block with an MLP, a linear head."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, (SIZE // 4) ** 2, dim) * 0.1)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down, self.head = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim), nn.Linear(dim, 4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BND = self.patch(x_BCHW).flatten(2).transpose(1, 2) + self.position
        q_BND, k_BND, v_BND = self.qkv(self.norm1(x_BND)).chunk(3, dim=-1)
        weights_BNN = torch.softmax(q_BND @ k_BND.transpose(1, 2) / 4.0, dim=-1)
        x_BND = x_BND + self.proj(weights_BNN @ v_BND)
        x_BND = x_BND + self.down(F.gelu(self.up(self.norm2(x_BND))))
        y_BC: Tensor = self.head(self.norm3(x_BND).mean(1))
        return y_BC


class Branching(nn.Module):
    """Takes a path that depends on a value: torch.fx cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x_BC: Tensor) -> Tensor:
        x_BC = torch.relu(self.first(x_BC))
        if x_BC.sum() > 0:
            x_BC = torch.relu(self.second(x_BC))
        y_BC: Tensor = self.head(x_BC)
        return y_BC


def image_net(net: nn.Module, *, outputs: tuple[tuple[int, ...], ...] = ((4,),)) -> tuple[nn.Module, IOSpec]:
    """One of the nets above that take one image, settled, and its specification."""
    io = io_of((3, SIZE, SIZE), outputs=outputs)
    return settle(net, io), io


def untraceable() -> tuple[nn.Module, IOSpec]:
    """`Branching` and its specification; its input can be negative."""
    torch.manual_seed(0)
    return Branching().eval(), io_of((6,), outputs=((3,),), positive=False)


def vit() -> tuple[nn.Module, IOSpec]:
    """`SmallViT` and its specification."""
    return image_net(SmallViT())


def residual() -> tuple[nn.Module, IOSpec]:
    """`Residual` and its specification."""
    return image_net(Residual())


def concat() -> tuple[nn.Module, IOSpec]:
    """`SkipConcat` and its specification."""
    return image_net(SkipConcat(), outputs=((1, 2 * SIZE, 2 * SIZE),))


def zero_gamma(shift: float = 0.0) -> tuple[nn.Module, IOSpec]:
    """`ZeroGamma` whose branch gives `shift` everywhere, and its specification."""
    net, io = image_net(ZeroGamma())
    with torch.no_grad():
        net.get_parameter("norm.weight").zero_()
        net.get_parameter("norm.bias").fill_(shift)
    return net, io


NETS: dict[str, Callable[[], tuple[nn.Module, IOSpec]]] = {
    "bev": bev_student, "residual": residual, "concat": concat, "vit": vit, "untraceable": untraceable,
}

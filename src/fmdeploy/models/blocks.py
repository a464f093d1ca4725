"""The few blocks that the built-in networks are made of.

Legend: B batch, C channels, H W rows and columns of the map.
"""

from __future__ import annotations

from torch import Tensor, nn

GROUPS = 8


def conv_bn_relu(num_in: int, num_out: int, *, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU: the pattern that TensorRT and ONNX Runtime fuse into one INT8 kernel."""
    return nn.Sequential(*_conv_bn(num_in, num_out, kernel, stride, dilation), nn.ReLU())


def _conv_bn(num_in: int, num_out: int, kernel: int, stride: int, dilation: int) -> tuple[nn.Module, nn.Module]:
    pad = dilation * (kernel // 2)
    conv = nn.Conv2d(num_in, num_out, kernel, stride, padding=pad, dilation=dilation, bias=False)
    return conv, nn.BatchNorm2d(num_out)


class ResidualBN(nn.Module):
    """`relu(x + bn(conv(relu(bn(conv(x))))))`, with a plain `a + b` that `torch.fx` can find (arXiv:1512.03385)."""

    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.first = conv_bn_relu(channels, channels, dilation=dilation)
        self.second = nn.Sequential(*_conv_bn(channels, channels, 3, 1, 1))
        self.relu = nn.ReLU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        y_BCHW: Tensor = self.relu(x_BCHW + self.second(self.first(x_BCHW)))
        return y_BCHW


def conv_gn_relu(num_in: int, num_out: int, *, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution, GroupNorm, ReLU: no statistics over the batch, so any number of processes computes the same."""
    pad = dilation * (kernel // 2)
    conv = nn.Conv2d(num_in, num_out, kernel, stride, padding=pad, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(GROUPS, num_out), nn.ReLU())


class ResidualGN(nn.Module):
    """A residual block with GroupNorm (arXiv:1803.08494)."""

    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.first = conv_gn_relu(channels, channels, dilation=dilation)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.relu = nn.ReLU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        y_BCHW: Tensor = self.relu(x_BCHW + self.norm(self.second(self.first(x_BCHW))))
        return y_BCHW

"""U-Net (arXiv:1505.04597) with padding, so that sizes are kept, at any width and depth."""

from __future__ import annotations

from fmdeploy.estimate.networks.sketch import Sketch


def unet(size: int = 128, width: int = 32, levels: int = 4, seed: int | None = None) -> Sketch:
    """Segmentation of size × size images into 8 classes."""
    net = Sketch("unet", (1, 3, size, size), seed)
    x, skips = _pair(net, "input", width), []
    for level in range(1, levels):
        skips.append(x)
        x = _pair(net, net.max_pool(x, 2, 2, pad=0), width << level)
    for level in reversed(range(levels - 1)):
        x = _pair(net, net.concat([skips[level], net.deconv(x, width << level, 2)]), width << level)
    net.conv(x, 8)
    return net


def _pair(net: Sketch, x: str, width: int) -> str:
    return net.conv(net.conv(x, width, 3, act="relu"), width, 3, act="relu")

"""MobileNetV2 (arXiv:1801.04381, table 2)."""

from __future__ import annotations

from fmdeploy.estimate.networks.sketch import Sketch

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def mobilenet_v2(size: int = 224, seed: int | None = None) -> Sketch:
    """Width 1.0 on size × size images, 1000 classes."""
    net = Sketch("mobilenet_v2", (1, 3, size, size), seed)
    x = net.conv("input", 32, 3, 2, act="relu6")
    for expansion, width, repeats, stride in STAGES:
        for index in range(repeats):
            x = _inverted(net, x, expansion, width, 1 if index else stride)
    net.linear(net.global_pool(net.conv(x, 1280, act="relu6")), 1000)
    return net


def _inverted(net: Sketch, x: str, expansion: int, width: int, stride: int) -> str:
    inner = net.shape(x)[1] * expansion
    y = x if expansion == 1 else net.conv(x, inner, act="relu6")
    y = net.conv(net.conv(y, inner, 3, stride, groups=inner, act="relu6"), width)
    return net.add(x, y) if net.shape(x) == net.shape(y) else y

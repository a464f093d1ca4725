"""ResNet (arXiv:1512.03385, table 1) with the stride in the 3 × 3 convolution, as torchvision has it."""

from __future__ import annotations

from fmdeploy.estimate.networks.sketch import Sketch

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


def resnet(depth: int, size: int = 224, seed: int | None = None) -> Sketch:
    """ResNet-18, -34 or -50 on size × size images, 1000 classes."""
    net = Sketch(f"resnet{depth}", (1, 3, size, size), seed)
    x = net.max_pool(net.conv("input", 64, 7, 2, act="relu"), 3, 2)
    block = _bottleneck if depth >= 50 else _basic
    for stage, count in enumerate(BLOCKS[depth]):
        for index in range(count):
            x = block(net, x, 64 << stage, 2 if stage and not index else 1)
    net.linear(net.global_pool(x), 1000)
    return net


def _basic(net: Sketch, x: str, width: int, stride: int) -> str:
    y = net.conv(net.conv(x, width, 3, stride, act="relu"), width, 3)
    return net.add(y, _shortcut(net, x, width, stride), act="relu")


def _bottleneck(net: Sketch, x: str, width: int, stride: int) -> str:
    y = net.conv(net.conv(net.conv(x, width, act="relu"), width, 3, stride, act="relu"), 4 * width)
    return net.add(y, _shortcut(net, x, 4 * width, stride), act="relu")


def _shortcut(net: Sketch, x: str, width: int, stride: int) -> str:
    return x if net.shape(x)[1] == width else net.conv(x, width, 1, stride)

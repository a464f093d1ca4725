"""YOLOv5s, YOLOv8n and the YOLO11 family, from their published layer tables (widths, repeats, strides).

Sources: the tables of arXiv:2407.20892 (YOLOv5), arXiv:2408.15857 (YOLOv8) and arXiv:2410.17725 (YOLO11). The boxes
come out as the exported files give them, before non-maximum suppression.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

from fmdeploy.estimate.networks.sketch import Sketch

CLASSES, BINS = 80, 16
SCALES = {  # depth, width, largest number of channels
    "n": (0.50, 0.25, 1024), "s": (0.50, 0.50, 1024), "m": (0.50, 1.0, 512), "l": (1.0, 1.0, 512), "x": (1.0, 1.5, 512)}
Stage = Callable[[str, int, int, bool], str]


def _width(channels: int, width: float, largest: int) -> int:
    return ceil(min(channels, largest) * width / 8) * 8


def yolo11(scale: str, size: int = 640) -> Sketch:
    """YOLO11 n, s, m, l or x."""
    depth, width, largest = SCALES[scale]
    net = Sketch(f"yolo11{scale}", (1, 3, size, size))
    heavy = scale in "mlx"  # these use the deeper inner block everywhere

    def channels(count: int) -> int:
        return _width(count, width, largest)

    def stage(x: str, out: int, deep: bool, share: float = 0.5) -> str:
        inner = int(channels(out) * share)
        return _split_stage(net, x, channels(out), inner, max(1, round(2 * depth)),
                            lambda y: _csp3(net, y, inner, 2) if deep or heavy else _pair(net, y, inner, inner // 2))

    x = _conv(net, _conv(net, "input", channels(64), 3, 2), channels(128), 3, 2)
    p3 = stage(_conv(net, stage(x, 256, False, 0.25), channels(256), 3, 2), 512, False, 0.25)
    p4 = stage(_conv(net, p3, channels(512), 3, 2), 512, True)
    p5 = stage(_conv(net, p4, channels(1024), 3, 2), 1024, True)
    p5 = _attention_stage(net, _pyramid_pool(net, p5, channels(1024)), max(1, round(2 * depth)))
    up4 = stage(net.concat([net.resize(p5), p4]), 512, False)
    up3 = stage(net.concat([net.resize(up4), p3]), 256, False)
    down4 = stage(net.concat([_conv(net, up3, channels(256), 3, 2), up4]), 512, False)
    down5 = stage(net.concat([_conv(net, down4, channels(512), 3, 2), p5]), 1024, True)
    _detect(net, [up3, down4, down5], light=True)
    return net


def yolov8n(size: int = 640) -> Sketch:
    """YOLOv8 nano: depth 0.33, width 0.25."""
    net = Sketch("yolov8n", (1, 3, size, size))

    def stage(x: str, out: int, repeats: int, shortcut: bool) -> str:
        inner = out // 2
        return _split_stage(net, x, out, inner, repeats, lambda y: _pair(net, y, inner, inner, shortcut))

    x = _conv(net, _conv(net, "input", 16, 3, 2), 32, 3, 2)
    p3 = stage(_conv(net, stage(x, 32, 1, True), 64, 3, 2), 64, 2, True)
    p4 = stage(_conv(net, p3, 128, 3, 2), 128, 2, True)
    p5 = _pyramid_pool(net, stage(_conv(net, p4, 256, 3, 2), 256, 1, True), 256)
    up4 = stage(net.concat([net.resize(p5), p4]), 128, 1, False)
    up3 = stage(net.concat([net.resize(up4), p3]), 64, 1, False)
    down4 = stage(net.concat([_conv(net, up3, 64, 3, 2), up4]), 128, 1, False)
    down5 = stage(net.concat([_conv(net, down4, 128, 3, 2), p5]), 256, 1, False)
    _detect(net, [up3, down4, down5], light=False)
    return net


def yolov5s(size: int = 640) -> Sketch:
    """YOLOv5 small, release 6: depth 0.33, width 0.5, with anchors."""
    net = Sketch("yolov5s", (1, 3, size, size))
    x = _conv(net, net.conv("input", 32, 6, 2, act="silu", pad=2), 64, 3, 2)
    p3 = _csp3(net, _conv(net, _csp3(net, x, 64, 1), 128, 3, 2), 128, 2, thin=True)
    p4 = _csp3(net, _conv(net, p3, 256, 3, 2), 256, 3, thin=True)
    p5 = _pyramid_pool(net, _csp3(net, _conv(net, p4, 512, 3, 2), 512, 1, thin=True), 512)
    low5 = _conv(net, p5, 256)
    low4 = _conv(net, _csp3(net, net.concat([net.resize(low5), p4]), 256, 1, False, thin=True), 128)
    out3 = _csp3(net, net.concat([net.resize(low4), p3]), 128, 1, False, thin=True)
    out4 = _csp3(net, net.concat([_conv(net, out3, 128, 3, 2), low4]), 256, 1, False, thin=True)
    out5 = _csp3(net, net.concat([_conv(net, out4, 256, 3, 2), low5]), 512, 1, False, thin=True)
    for level in (out3, out4, out5):
        _, _, height, width = net.shape(level)
        boxes = net.reshape(net.conv(level, 3 * (CLASSES + 5)), (1, 3, CLASSES + 5, height, width))
        net.act(net.transpose(boxes, (0, 1, 3, 4, 2)), "sigmoid")
    return net


def _conv(net: Sketch, x: str, out: int, kernel: int = 1, stride: int = 1) -> str:
    return net.conv(x, out, kernel, stride, act="silu")


def _pair(net: Sketch, x: str, out: int, inner: int, shortcut: bool = True, first: int = 3) -> str:
    """Two convolutions and, where asked, the residual around them."""
    y = _conv(net, _conv(net, x, inner, first), out, 3)
    return net.add(x, y) if shortcut else y


def _csp3(net: Sketch, x: str, out: int, repeats: int, shortcut: bool = True, thin: bool | None = None) -> str:
    """Two branches of half the width, one of them deep, joined by a third convolution. `thin`: 1 × 1 first."""
    half = out // 2
    y, side = _conv(net, x, half), _conv(net, x, half)
    for _ in range(repeats):
        y = _pair(net, y, half, half, shortcut, 1 if thin or net.name == "yolov5s" else 3)
    return _conv(net, net.concat([y, side]), out)


def _split_stage(net: Sketch, x: str, out: int, inner: int, repeats: int, block: Callable[[str], str]) -> str:
    """Split in two, run blocks on the second half, join everything that was made on the way."""
    x = _conv(net, x, 2 * inner)
    parts = [net.part(x, 0, inner), net.part(x, inner, 2 * inner)]
    for _ in range(repeats):
        parts.append(block(parts[-1]))
    return _conv(net, net.concat(parts), out)


def _pyramid_pool(net: Sketch, x: str, out: int) -> str:
    """Three max poolings of 5 × 5 in a row, joined."""
    parts = [_conv(net, x, net.shape(x)[1] // 2)]
    for _ in range(3):
        parts.append(net.max_pool(parts[-1], 5))
    return _conv(net, net.concat(parts), out)


def _attention_stage(net: Sketch, x: str, repeats: int) -> str:
    """Half of the channels pass through attention and a small perceptron, `repeats` times."""
    out = net.shape(x)[1]
    half = out // 2
    x = _conv(net, x, out)
    kept, y = net.part(x, 0, half), net.part(x, half, out)
    for _ in range(repeats):
        y = net.add(y, _map_attention(net, y, half // 64))
        y = net.add(y, net.conv(_conv(net, y, 2 * half), half))
    return _conv(net, net.concat([kept, y]), out)


def _map_attention(net: Sketch, x: str, heads: int) -> str:
    """Attention over the pixels of a map; keys are half as wide as values, which get a depthwise position term."""
    batch, width, rows, columns = net.shape(x)
    value = width // heads
    key, pixels = value // 2, rows * columns
    qkv = net.reshape(net.conv(x, 2 * width), (batch, heads, 2 * key + value, pixels))
    q, k, v = (net.part(qkv, a, b, 2) for a, b in ((0, key), (key, 2 * key), (2 * key, 2 * key + value)))
    scores = net.softmax(net.scale(net.matmul(net.transpose(q, (0, 1, 3, 2)), k), key**-0.5))
    mixed = net.reshape(net.matmul(v, net.transpose(scores, (0, 1, 3, 2))), (batch, width, rows, columns))
    place = net.conv(net.reshape(v, (batch, width, rows, columns)), width, 3, groups=width)
    return net.conv(net.add(mixed, place), width)


def _detect(net: Sketch, levels: list[str], *, light: bool) -> None:
    """Boxes as distributions over bins and class scores; `light` (YOLO11) separates the class branch by depth."""
    first = net.shape(levels[0])[1]
    box, cls = max(16, first // 4, 4 * BINS), max(first, min(CLASSES, 100))
    maps = []
    for x in levels:
        boxes = net.conv(_conv(net, _conv(net, x, box, 3), box, 3), 4 * BINS)
        scores = x
        for _ in range(2):
            if light:
                width = net.shape(scores)[1]
                scores = _conv(net, net.conv(scores, width, 3, groups=width, act="silu"), cls)
            else:
                scores = _conv(net, scores, cls, 3)
        both = net.concat([boxes, net.conv(scores, CLASSES)])
        pixels = net.shape(both)[2] * net.shape(both)[3]
        maps.append(net.reshape(both, (1, 4 * BINS + CLASSES, pixels)))
    _decode(net, net.concat(maps, 2))


def _decode(net: Sketch, x: str) -> None:
    """Expected value of the box distributions, and sigmoid scores."""
    pixels = net.shape(x)[2]
    boxes = net.reshape(net.part(x, 0, 4 * BINS), (1, 4, BINS, pixels))
    weights = net.softmax(net.transpose(boxes, (0, 2, 1, 3)), 1)
    distance = net.reshape(net.conv(weights, 1), (1, 4, pixels))
    net.concat([net.scale(distance, 8.0), net.act(net.part(x, 4 * BINS, 4 * BINS + CLASSES), "sigmoid")])

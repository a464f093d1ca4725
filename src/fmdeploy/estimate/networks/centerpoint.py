"""The 2D half of CenterPoint on nuScenes (arXiv:2006.11275): SECOND backbone and neck, and six centre heads.

Widths follow the published 0.075 m configuration: a 180 × 180 map of 256 channels comes from the sparse encoder.
"""

from __future__ import annotations

from fmdeploy.estimate.networks.sketch import Sketch

TASKS = (1, 2, 2, 1, 2, 2)  # classes a head
REGRESSIONS = (2, 1, 3, 2, 2)  # offset, height, size, rotation, velocity


def centerpoint_head() -> Sketch:
    """Backbone, neck and heads."""
    net = Sketch("centerpoint_rpn_head", (1, 256, 180, 180))
    low = _block(net, "input", 128, 1)
    high = _block(net, low, 256, 2)
    x = net.concat([net.conv(low, 256, act="relu"), net.deconv(high, 256, 2, act="relu")])
    x = net.conv(x, 64, 3, act="relu")
    for classes in TASKS:
        for out in (*REGRESSIONS, classes):
            net.conv(net.conv(x, 64, 3, act="relu"), out, 3)
    return net


def _block(net: Sketch, x: str, width: int, stride: int) -> str:
    x = net.conv(x, width, 3, stride, act="relu")
    for _ in range(5):
        x = net.conv(x, width, 3, act="relu")
    return x

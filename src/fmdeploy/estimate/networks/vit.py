"""Vision transformers (arXiv:2010.11929, table 1; the tiny and small widths are of DeiT, arXiv:2012.12877)."""

from __future__ import annotations

from fmdeploy.estimate.networks.sketch import Sketch

WIDTHS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
DEPTH = 12


def vit(kind: str, size: int = 224, patch: int = 16, seed: int | None = None) -> Sketch:
    """ViT with a class token on size × size images, 1000 classes."""
    width, heads = WIDTHS[kind]
    net = Sketch(f"vit_{kind}", (1, 3, size, size), seed)
    x = net.conv("input", width, patch, patch, pad=0)
    tokens = (size // patch) ** 2
    x = net.transpose(net.reshape(x, (1, width, tokens)), (0, 2, 1))
    x = net.concat([net.weight((1, 1, width)), x], 1)
    x = net.add(x, net.weight((1, tokens + 1, width)))
    for _ in range(DEPTH):
        x = net.add(x, net.attention(net.norm(x), heads))
        x = net.add(x, net.linear(net.linear(net.norm(x), 4 * width, act="gelu"), width))
    x = net.reshape(net.part(net.norm(x), 0, 1), (1, width))
    net.linear(x, 1000)
    return net

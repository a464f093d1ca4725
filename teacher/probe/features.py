"""Frozen features of any network of a task: the tokens of a backbone, or the map of a named layer.

Legend: B batch, P pooled features, D channels, h w rows and columns of a feature map, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmdeploy.arrays import Arrays
from fmdeploy.iospec import IOSpec
from fmdeploy.models import input_list
from fmdeploy.models.tokens import TokenBackbone
from fmdeploy.models.vit import class_and_grid
from fmdeploy.teacher.probe.subject import FeatureMaps
from fmdeploy.teacher.view import as_map

Compute = Callable[[Arrays], FeatureMaps]


def features_of(module: nn.Module, io: IOSpec, layer: str) -> Compute | None:
    """How to get features of `module`; None where it has neither a token backbone nor the layer.

    A token backbone gives its class token beside the mean of the others, and its tokens as a map: what DINOv2 trains
    its linear probes on (arXiv:2304.07193, section 7.1). Any other network gives the map of `layer`, averaged.
    """
    backbone = getattr(module, "backbone", None)
    if isinstance(backbone, TokenBackbone):
        return _of_tokens(backbone, io)
    if any(_belongs(name, layer) for name, _ in module.named_modules()):
        return _of_layer(module, io, layer)
    return None


def _of_tokens(backbone: TokenBackbone, io: IOSpec) -> Compute:
    def compute(inputs: Arrays) -> FeatureMaps:
        state_BND = backbone.tokens(*_tensors(backbone, io, inputs)).float().cpu()
        class_BD, map_BDhw = class_and_grid(state_BND, backbone.side)
        return FeatureMaps(torch.cat((class_BD, map_BDhw.mean((2, 3))), dim=1), map_BDhw)

    return _frozen(backbone, compute)


def _of_layer(module: nn.Module, io: IOSpec, layer: str) -> Compute:
    tap = LayerTap(module, layer)

    def compute(inputs: Arrays) -> FeatureMaps:
        with tap:
            module(*_tensors(module, io, inputs))
        map_BDhw = as_map(tap.take()).float().cpu()
        return FeatureMaps(map_BDhw.mean((2, 3)), map_BDhw)

    return _frozen(module, compute)


def _frozen(module: nn.Module, compute: Compute) -> Compute:
    """`compute` in evaluation mode and without gradient; the mode is put back, since training may go on."""

    def frozen(inputs: Arrays) -> FeatureMaps:
        modes = [(part, part.training) for part in module.modules()]
        module.eval()
        try:
            with torch.no_grad():
                return compute(inputs)
        finally:
            for part, mode in modes:
                part.training = mode

    return frozen


def _tensors(module: nn.Module, io: IOSpec, inputs: Arrays) -> list[Tensor]:
    device = next(module.parameters()).device
    return [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in input_list(io, inputs)]


def _belongs(name: str, layer: str) -> bool:
    return bool(layer) and (name == layer or name.startswith(f"{layer}."))


class LayerTap:
    """Keeps the last output of a layer, or of the last module inside it, while it is entered.

    A network that was traced by torch.fx (a quantised one) calls the parts of a layer and never the layer itself.
    """

    def __init__(self, network: nn.Module, layer: str) -> None:
        self.modules = [module for name, module in network.named_modules() if _belongs(name, layer)]
        self.layer = layer
        self._found: Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> LayerTap:
        self._handles = [module.register_forward_hook(self._keep) for module in self.modules]
        return self

    def __exit__(self, *reason: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output
        # The quantisers of a layer's weights are modules inside it, too: what they return is no map of the batch.
        if isinstance(found, Tensor) and (not inputs or found.shape[0] == inputs[0].shape[0]):
            self._found = found

    def take(self) -> Tensor:
        """The output of the last forward pass; kept no longer."""
        found, self._found = self._found, None
        assert found is not None, f"the layer {self.layer} took no part in the forward pass"
        return found

"""What a student may learn from a teacher: its logits, and the maps of chosen layers.

Legend: B batch, C channels, D channels of a layer's map, h w its rows and columns, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmdeploy.errors import ConfigError
from fmdeploy.iospec import IOSpec
from fmdeploy.models import input_list, named_outputs
from fmdeploy.task import Arrays
from fmdeploy.training.config import Precision
from fmdeploy.training.device import autocast

FEATURE = "feature."


class Tap:
    """Keeps the last output of one module of a network.

    Raises:
        ConfigError: the network has no module of that name.
    """

    def __init__(self, network: nn.Module, layer: str) -> None:
        modules = dict(network.named_modules())
        if not layer or layer not in modules:
            near = ", ".join(name for name in modules if name and "." not in name)
            raise ConfigError("the network has no such layer", where=f"layer {layer!r}", expected=near)
        self.layer = layer
        self._found: Tensor | None = None
        self._handle = modules[layer].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._found = output[0] if isinstance(output, tuple) else output

    def take(self) -> Tensor:
        """The map (B, D, h, w) of the last forward pass."""
        found, self._found = self._found, None
        if found is None:
            raise ConfigError("the layer took no part in the forward pass", where=f"layer {self.layer!r}")
        return as_map(found)

    def remove(self) -> None:
        """Take the hook off the network."""
        self._handle.remove()


def as_map(x: Tensor) -> Tensor:
    """Any layer's output as (B, D, h, w): tokens (B, N, D) lose class tokens, vectors (B, D) become 1 x 1 maps."""
    if x.ndim == 4:
        return x
    if x.ndim == 2:
        return x[:, :, None, None]
    side = math.isqrt(x.shape[1])
    return x[:, x.shape[1] - side * side :].transpose(1, 2).reshape(x.shape[0], x.shape[2], side, side)


class TeacherView:
    """A frozen teacher that returns named logits and `feature.<layer>` maps.

    Args:
        module: The teacher.
        io: Its task's specification.
        layers: Modules whose maps are wanted.
        precision: Arithmetic of the forward pass; results are float32.
    """

    def __init__(self, module: nn.Module, io: IOSpec, layers: Sequence[str], precision: Precision) -> None:
        self.module, self.io, self.precision = module.eval().requires_grad_(False), io, precision
        self.taps = {FEATURE + layer: Tap(module, layer) for layer in layers}

    def tensors(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Logits (B, ...) and maps (B, D, h, w) of inputs (B, ...), without gradient."""
        device = next(iter(inputs.values())).device
        self.module.to(device)
        with torch.no_grad(), autocast(self.precision, device):
            found = named_outputs(self.io, self.module(*input_list(self.io, inputs)))
        found |= {name: tap.take() for name, tap in self.taps.items()}
        return {name: value.float() for name, value in found.items()}

    def arrays(self, inputs: Arrays, device: torch.device) -> Arrays:
        """The same from and to numpy, computed on `device`."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)).to(device) for name, value in inputs.items()}
        return {name: value.cpu().numpy() for name, value in self.tensors(tensors).items()}

    def logits(self, inputs: Arrays) -> Arrays:
        """Logits alone, on the device the teacher is on: what `evaluate` calls."""
        found = self.arrays(inputs, next(self.module.parameters()).device)
        return {spec.name: found[spec.name] for spec in self.io.outputs}

"""One forward and backward pass without computing anything: how many FLOPs it takes, what it keeps for the gradient.

The one place that uses `torch._subclasses.fake_tensor`, which is private: nothing public runs a network on shapes
alone with the dtypes that autocast would give. A test compares it with a pass that is really computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils.flop_counter import FlopCounterMode

from fmdeploy.training.config import Precision
from fmdeploy.training.device import autocast

CPU = torch.device("cpu")
# What code raises on shapes alone when it looks at the numbers.
LOOKED = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


@dataclass(frozen=True)
class Pass:
    """What the forward and backward pass of one share of a step costs.

    Attributes:
        forward_flops: Of the forward pass; a multiply-add counts as two.
        total_flops: Of forward and backward pass, recomputed activations included.
        activation_bytes: Kept from the forward pass for the backward pass.
    """

    forward_flops: float
    total_flops: float
    activation_bytes: float


def measure_pass(module: nn.Module, loss: Callable[[], Tensor], precision: Precision, *, fake: bool = True) -> Pass:
    """Cost of the gradient of `loss()` by the parameters of `module`.

    Args:
        module: With its real parameters; they are not touched.
        loss: Makes its inputs and returns a scalar; called in training mode and, unless `fake` is false, on shapes
            alone.
        precision: Arithmetic of the forward pass; `fp16` is counted as bf16, of the same size.
        fake: False computes for real.

    Raises:
        LOOKED: `loss` looks at numbers, and there are none.
    """
    was_training = module.training
    module.train()
    kept = _Kept(module)
    counter = FlopCounterMode(display=False)
    mixed: Precision = "fp32" if precision == "fp32" else "bf16"
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.enable_grad(), counter:
            with kept, autocast(mixed, CPU):
                total = loss()
            forward = counter.get_total_flops()
            wanted = [p for p in module.parameters() if p.requires_grad]
            torch.autograd.grad(total, wanted, allow_unused=True)
    finally:
        module.train(was_training)
    return Pass(forward, counter.get_total_flops(), kept.bytes())


class _Kept:
    """Listens to what autograd saves; each storage counts once, the parameters not at all."""

    def __init__(self, module: nn.Module) -> None:
        self._own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
        self._found: dict[int, Any] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._found[storage._cdata] = storage  # held, so that its address is not given to another one
        return tensor

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def bytes(self) -> float:
        """Of all storages together."""
        return float(sum(storage.nbytes() for storage in self._found.values()))

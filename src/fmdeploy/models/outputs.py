"""What a network returns, and how big it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmdeploy.arrays import Arrays
from fmdeploy.errors import DataError
from fmdeploy.iospec import IOSpec


def named_outputs(io: IOSpec, raw: Any) -> dict[str, Tensor]:
    """Give the outputs of a network the names of the task's specification.

    Args:
        io: The task's specification; its `outputs` are in the order the network returns them.
        raw: A tensor, or a tuple or list of tensors, each `(B, ...)`; a mapping is taken as named already.

    Raises:
        DataError: the number of tensors differs from the specification.
    """
    names = [spec.name for spec in io.outputs]
    if isinstance(raw, Mapping):
        values = [raw[name] for name in names if name in raw]
    else:
        values = list(raw) if isinstance(raw, tuple | list) else [raw]
    if len(values) != len(names):
        raise DataError(
            "the network returns another number of outputs than the task names",
            expected=", ".join(names), found=len(values), fix="Return one tensor for each, in that order",
        )
    return dict(zip(names, values, strict=True))


def input_list(io: IOSpec, inputs: Mapping[str, Any]) -> list[Any]:
    """The inputs in the order in which a network takes them."""
    return [inputs[spec.name] for spec in io.inputs]


def example_inputs(io: IOSpec, batch: int = 1) -> tuple[Tensor, ...]:
    """Zeros of the specified shapes and dtypes: enough to trace or count a network."""
    return tuple(
        torch.zeros((batch, *spec.shape), dtype=getattr(torch, spec.dtype)) for spec in io.inputs
    )


def num_parameters(module: nn.Module) -> int:
    """Number of parameters, buffers such as BatchNorm's running statistics left out."""
    return sum(parameter.numel() for parameter in module.parameters())


def predictor(module: nn.Module, io: IOSpec) -> Callable[[Arrays], Arrays]:
    """`module` in fp32, in evaluation mode, as a function from numpy inputs (B, ...) to numpy outputs (B, ...)."""

    def predict(inputs: Arrays) -> Arrays:
        device = next(module.parameters()).device
        tensors = [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in input_list(io, inputs)]
        module.eval()
        with torch.inference_mode():
            named = named_outputs(io, module(*tensors))
        return {name: value.float().cpu().numpy() for name, value in named.items()}

    return predict

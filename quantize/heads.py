"""The output heads of a module that torch.fx cannot trace: read off the autograd graph of one forward pass."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fmdeploy.quantize.ops import WEIGHTED_MODULES
from fmdeploy.quantize.trace import as_tuple


def head_modules(model: nn.Module, example: tuple[Tensor, ...]) -> set[str]:
    """Names of the first conv and linear modules met when walking back from each output.

    Args:
        model: any module; not changed.
        example: one input batch (B, ...) float32 an argument.
    """
    model = copy.deepcopy(model).eval().requires_grad_(True)
    owner = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, WEIGHTED_MODULES)}
    with torch.enable_grad():
        todo: list[Any] = [output.grad_fn for output in as_tuple(model(*(x.clone() for x in example)))]
    heads: set[str] = set()
    seen: set[Any] = set()
    while todo:
        function = todo.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        sources = [source for source, _ in function.next_functions if source is not None]
        found = {owner[id(variable)] for s in sources if id(variable := _variable(s)) in owner}
        heads |= found
        todo += [] if found else sources
    return heads


def _variable(function: Any) -> Tensor | None:
    """The parameter behind an accumulation node, seen through the transpose that Linear puts in between."""
    if function.name() in ("TBackward0", "PermuteBackward0", "TransposeBackward0") and function.next_functions:
        function = function.next_functions[0][0]
    variable: Tensor | None = getattr(function, "variable", None)
    return variable

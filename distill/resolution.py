"""Progressive resolution: the first steps see small maps, which cost a fraction (arXiv:2104.00298, section 4).

Inputs are averaged. Labels and dense logits take the largest value of a window: a coarse cell is occupied where any of
its cells is, and is so at least with the largest of their probabilities. The teacher's features are averaged.

Legend: B batch, C channels, H W rows and columns of a map.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from fmdeploy.errors import ConfigError
from fmdeploy.iospec import IOSpec
from fmdeploy.models import example_inputs, named_outputs
from fmdeploy.teacher.view import FEATURE


def reduced(values: dict[str, Any], factor: int, *, mean: bool) -> dict[str, Any]:
    """Every map (B, C, H, W), array or tensor, by `factor`; what is no map stays, features are always averaged."""
    return {name: _reduced(value, factor, mean or name.startswith(FEATURE)) if value.ndim == 4 else value
            for name, value in values.items()}


def _reduced(value: Any, factor: int, mean: bool) -> Any:
    if isinstance(value, np.ndarray):
        pooled = _pooled(torch.from_numpy(np.array(value, np.float32)), factor, mean)
        return np.ascontiguousarray(pooled.numpy().astype(value.dtype))
    return _pooled(value.float(), factor, mean)


def _pooled(map_BCHW: Tensor, factor: int, mean: bool) -> Tensor:
    return avg_pool2d(map_BCHW, factor) if mean else max_pool2d(map_BCHW, factor)


def require_any_resolution(student: nn.Module, io: IOSpec, factor: int) -> None:
    """Try one forward pass at the reduced resolution.

    Raises:
        ConfigError: the maps do not divide by `factor`, or the student takes only its own resolution.
    """
    whole = example_inputs(io)
    for spec in (*io.inputs, *io.outputs):
        if len(spec.shape) == 3 and any(side % factor for side in spec.shape[1:]):
            raise ConfigError("cannot be reduced", where=f"{spec.name} {list(spec.shape)}",
                              expected=f"sides that are multiples of {factor}", fix="Change --progressive-factor")
    small = [_pooled(x, factor, True) if x.ndim == 4 else x for x in whole]
    was_training = student.training
    try:
        with torch.no_grad():
            found = named_outputs(io, student.eval()(*small))
    except (RuntimeError, ValueError) as error:
        raise _fixed(f"it fails with {str(error).splitlines()[0][:100]}") from error
    finally:
        student.train(was_training)
    for spec in io.outputs:
        shape = spec.shape if len(spec.shape) != 3 else (spec.shape[0], *(side // factor for side in spec.shape[1:]))
        if tuple(found[spec.name].shape[1:]) != shape:
            raise _fixed(f"{spec.name} has the shape {list(found[spec.name].shape[1:])} instead of {list(shape)}")


def _fixed(why: str) -> ConfigError:
    return ConfigError(f"the student works at its own resolution only: {why}", where="progressive",
                       fix="Leave --progressive out, or take a student that is convolutional throughout, such as cnn")

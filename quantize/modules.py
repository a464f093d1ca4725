"""Quantisation of single modules, for a `forward` that no tracer can follow: inputs and weights of Linear and Conv."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fmdeploy.errors import ConfigError, InputError
from fmdeploy.progress import say
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.heads import head_modules
from fmdeploy.quantize.ops import CONV_MODULES, TRANSPOSED_MODULES
from fmdeploy.quantize.outliers import columns_of, hold, measured, probe_modules, report
from fmdeploy.quantize.placement import TRANSPOSED_WHY, ActivationRow, FloatRow, Placement, Request, WeightRow
from fmdeploy.quantize.policy import require_known
from fmdeploy.quantize.samples import CalibrationSet
from fmdeploy.training.device import evaluation_mode

KINDS = (*CONV_MODULES, *TRANSPOSED_MODULES, nn.Linear)


def place_modules(
    model: nn.Module, calibration_set: CalibrationSet, names: Sequence[str], request: Request, reason: str
) -> Placement:
    """Decide the placement without a graph: no residual adds, no BatchNorm folding, one range an input.

    Args:
        model: any float module; not changed.
        calibration_set: its first sample shows which modules are called, some more what they read.
        names: the inputs of `model`, in the order of its arguments.
        request: what the user asks for.
        reason: why there is no graph.

    Raises:
        InputError: there is nothing to quantise.
        ConfigError: `request` names no such module or wants in INT8 what cannot be.
    """
    example = calibration_set.tensors(names, slice(0, 1))
    modules = {name: module for name, module in model.named_modules() if isinstance(module, KINDS)}
    called = {name: modules[name] for name in _called(model, example, modules)}
    floats = _floats(model, example, called, request)
    table = _table(called, floats, request, reason)
    with evaluation_mode(model):
        seen = probe_modules(model, [row.module for row in table.weights], calibration_set, names)
    rows = measured(table, {tensor_name(name): found for name, found in seen.items()},
                    {tensor_name(name): [columns_of(called[name])] for name in seen})
    wished = {} if request.table is None else request.table.layers
    held = {name: why for name, why in hold(table, rows, {n: n for n in called}, {}).items() if name not in wished}
    for line in report(rows, set(), held):
        say(line)
    return replace(_table(called, floats | held, request, reason), measured=rows)


def tensor_name(module: str) -> str:
    """What the placement calls the input of a module."""
    return f"input of {module}"


def _floats(
    model: nn.Module, example: tuple[Tensor, ...], called: Mapping[str, nn.Module], request: Request
) -> dict[str, str]:
    """Name → why of every layer that stays float by rule or on request."""
    require_known(request.keep_float, called, "conv or linear")
    wishes = {} if request.table is None else request.table.layers
    where = None if request.table is None else request.table.where
    require_known(wishes, called, "conv or linear", where)
    heads = set() if request.quantise_heads else head_modules(model, example)
    floats = {name: "output head" for name in called if name in heads and name not in wishes}
    for name, module in called.items():
        if isinstance(module, TRANSPOSED_MODULES):
            if name in wishes and wishes[name].precision == "int8":
                raise ConfigError(f"cannot run in INT8: {TRANSPOSED_WHY}", where=f"{where}, {name}")
            floats[name] = TRANSPOSED_WHY
    floats |= {name: wish.why or "float in the placement file" for name, wish in wishes.items()
               if wish.precision == "float"}
    return floats | dict.fromkeys(request.keep_float, "kept float on request")


def _table(
    called: Mapping[str, nn.Module], floats: Mapping[str, str], request: Request, reason: str
) -> Placement:
    chosen = [name for name in called if name not in floats]
    if not chosen:
        raise InputError("the model has no conv or linear layer that could be quantised",
                         found=next((f"{name}: {why}" for name, why in floats.items()), None))
    calibrators = {} if request.table is None else request.table.calibrators
    require_known(calibrators, map(tensor_name, called), "tensor", request.table.where if request.table else None)
    return Placement(
        "modules",
        reason,
        tuple(ActivationRow(name, (tensor_name(name),), (name,), calibrators.get(tensor_name(name)))
              for name in chosen),
        tuple(WeightRow(name, type(called[name]).__name__, int(called[name].get_parameter("weight").shape[0]))
              for name in chosen),
        (),
        tuple(FloatRow(name, floats[name], name, type(called[name]).__name__) for name in called if name in floats),
    )


def convert_modules(model: nn.Module, placement: Placement) -> nn.Module:
    """Return a quantised copy of `model` that `placement` describes, uncalibrated."""
    names = [row.module for row in placement.weights]
    return modelopt.convert(copy.deepcopy(model).eval(), weights=names, inputs=names)


def _called(model: nn.Module, example: tuple[Tensor, ...], modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of those modules that one forward pass calls, in that order; an unused one would see no data."""
    order: list[str] = []

    def note(name: str) -> RemovableHandle:
        return modules[name].register_forward_hook(lambda *_: order.append(name))

    handles = [note(name) for name in modules]
    try:
        with evaluation_mode(model):
            model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(order))

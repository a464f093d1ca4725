"""The one door to nvidia-modelopt (0.47): every quirk of it is handled here and nowhere else.

What the rest of fmdeploy needs from modelopt is small: fake-quantised weights and activations with frozen
ranges (`amax`), a max calibration, and an ONNX export that writes Q/DQ pairs. The quirks, each with a test in
`tests/unit/quantize/test_modelopt.py` that fails when it is gone:

- importing it needs `requests` and `huggingface_hub`, which it does not declare, and warns about versions;
- residual adds and other functional operations get no quantizer, hence `ActivationTensor`;
- the default configuration quantises the *input of every layer* (so one tensor may get several quantizers)
  and LayerNorm inputs, hence an explicit list of names after a rule that switches everything off;
- the ONNX export works with the TorchScript exporter only.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fmdeploy.errors import DataError, InputError
from fmdeploy.optional import require

INT8 = {"num_bits": 8, "axis": None}  # one scale a tensor, symmetric, zero point 0
INT8_PER_CHANNEL = {"num_bits": 8, "axis": 0}  # one scale an output channel; axis 0 of conv and linear weights
OPSETS = range(17, 21)  # 17 is the first with LayerNormalization; modelopt exports Q/DQ up to 20


class ActivationTensor(nn.Module):
    """The identity, standing in a graph where an activation tensor gets its one quantizer."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` (any shape, float32) unchanged; after `convert` its fake-quantised self."""
        return x


@functools.cache
def load() -> ModuleType:
    """Import `modelopt.torch.quantization` (10 to 15 s) and register `ActivationTensor` with it.

    Raises:
        MissingDependencyError: modelopt, or one of its undeclared dependencies, is not installed.
    """
    # requests and huggingface_hub are imported by modelopt.torch without being declared (upstream PR #2250):
    # asking for them first names the package that is really missing.
    for name in ("requests", "huggingface_hub"):
        require(name)
    with _quiet():  # "transformers x.y is not tested with current version of modelopt"
        mtq = require("modelopt.torch.quantization")
        quantizer_class = require("modelopt.torch.quantization.nn").TensorQuantizer

    def _setup(self: Any) -> None:
        self._register_temp_attribute("input_quantizer", quantizer_class(mtq.config.QuantizerAttributeConfig()))

    def forward(self: Any, x: Tensor) -> Tensor:
        quantised: Tensor = self.input_quantizer(x)
        return quantised

    inside = require("modelopt.torch.quantization.nn.modules.quant_module")
    if inside.QuantModuleRegistry.get(ActivationTensor) is None:  # a second registration is an error there
        body = {"_setup": _setup, "forward": forward}
        mtq.register(ActivationTensor, type("QuantActivationTensor", (inside.QuantModule,), body))
    return mtq


def convert(model: nn.Module, *, weights: Sequence[str], inputs: Sequence[str]) -> nn.Module:
    """Give `model` INT8 quantizers, in place, uncalibrated.

    Args:
        model: any module; Conv, Linear and `ActivationTensor` inside it change their class.
        weights: names of Conv and Linear modules whose weight is quantised per output channel.
        inputs: names of modules whose input is quantised per tensor (`ActivationTensor`, or Conv and Linear).
    """
    names = dict(model.named_modules())
    missing = [name for name in (*weights, *inputs) if name not in names]
    if missing:
        raise InputError(f"the model has no module {missing[0]!r} to quantise", found=sorted(names)[:8])
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    rules += [_rule(f"{name}.weight_quantizer", INT8_PER_CHANNEL) for name in weights]
    rules += [_rule(f"{name}.input_quantizer", INT8) for name in inputs]
    with _quiet():
        converted: nn.Module = load().quantize(model, {"quant_cfg": rules, "algorithm": None})
    return converted


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep modelopt from printing to stdout, where only results belong ("Inserted 65 quantizers"), and from warning."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _rule(quantizer_name: str, attributes: Mapping[str, object]) -> dict[str, Any]:
    # Names are matched as fnmatch patterns: a bracket in a module name would be read as a character class.
    return {"quantizer_name": quantizer_name.replace("[", "[[]"), "cfg": dict(attributes), "enable": True}


def calibrate(model: nn.Module, forward_loop: Callable[[nn.Module], None]) -> None:
    """Set the range of every enabled quantizer to the largest absolute value that `forward_loop` shows it.

    Ranges are collected with fake quantisation switched off, so they are those of the float model.
    """
    with _quiet():
        load().calibrate(model, "max", forward_loop)


def quantizers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and the `TensorQuantizer` of every enabled quantizer, a shared one once."""
    cls = load().nn.TensorQuantizer
    for name, module in model.named_modules():
        if isinstance(module, cls) and module.is_enabled:
            yield name, module


def ranges(model: nn.Module) -> dict[str, Tensor]:
    """Return `amax` of every enabled quantizer: () for activations, (C_out, 1, ...) for weights, float32.

    Raises:
        DataError: one of them has none, i.e. calibration never reached it.
    """
    found = {}
    for name, quantizer in quantizers(model):
        if quantizer.amax is None:
            raise DataError("this quantizer saw no data during calibration", where=name)
        found[name] = quantizer.amax.detach().clone().cpu()
    return found


def set_ranges(model: nn.Module, amax: dict[str, Tensor]) -> None:
    """Set `amax` of every enabled quantizer; the inverse of `ranges`."""
    own = dict(quantizers(model))
    if set(own) != set(amax):
        odd = sorted(set(own) ^ set(amax))
        raise InputError("stored ranges do not belong to this model", expected=f"{len(own)} ranges", found=odd[:4])
    for name, quantizer in own.items():
        quantizer.amax = amax[name]


def set_range(model: nn.Module, name: str, amax: Tensor) -> None:
    """Set `amax` of the quantizer `name` alone."""
    quantizer: Any = model.get_submodule(name)
    quantizer.amax = amax


def weight_ranges(model: nn.Module) -> dict[str, Tensor]:
    """Largest magnitude of each output channel of every quantised weight: (C_out, 1, ...) float32 by quantizer."""
    found = {}
    for name, _ in quantizers(model):
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight_quantizer":
            weight = model.get_submodule(owner).get_parameter("weight").detach()
            found[name] = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True).float().cpu()
    return found


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Run the float modules that modelopt converted, as if it never had, inside this context.

    `float_mode` computes the same, but every converted layer then still asks its three quantizers and rebuilds its
    weight attribute in Python: a third of a small network's time (measured). modelopt converts a module by giving it a
    new class that remembers the old one; here it gets the old one back for a while. Quantizers are not called.
    """
    converted = [(module, type(module)) for module in model.modules() if hasattr(type(module), "original_cls")]
    for module, _ in converted:
        module.__class__ = module.original_cls  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, cls in converted:
            module.__class__ = cls


@contextmanager
def float_mode(model: nn.Module) -> Iterator[None]:
    """Run `model` without any fake quantisation inside this context."""
    mine = [quantizer for _, quantizer in quantizers(model)]
    for quantizer in mine:
        quantizer.disable_quant()
    try:
        yield
    finally:
        for quantizer in mine:
            quantizer.enable_quant()


def onnx_export(model: nn.Module, args: tuple[Tensor, ...], path: str, **names: Any) -> None:
    """Write `model` with its Q/DQ pairs to `path` through the TorchScript exporter.

    dynamo=True stops in modelopt's `tensor_quant.py` at `if min_amax < 0` with GuardOnDataDependentSymNode.
    """
    with _quiet(), torch.no_grad():  # the TorchScript exporter announces its own retirement
        torch.onnx.export(model, args, path, dynamo=False, do_constant_folding=True, **names)

"""Quantised modules from a placement: the same call makes a fresh one and rebuilds a stored one."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from fmdeploy.errors import ArtifactError, InputError
from fmdeploy.iospec import IOSpec
from fmdeploy.models.outputs import example_inputs
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.heads import head_modules
from fmdeploy.quantize.ops import CONV_MODULES
from fmdeploy.quantize.placement import ActivationRow, FloatRow, Placement, WeightRow, place
from fmdeploy.quantize.trace import UntraceableError, float_graph
from fmdeploy.training.device import evaluation_mode

QUANTIZERS = "quantizers"  # the submodule that holds every ActivationTensor of a traced model


def build(
    model: nn.Module, example: tuple[Tensor, ...], *, keep_float: Iterable[str] = (), quantise_heads: bool = False
) -> tuple[nn.Module, Placement]:
    """Return an uncalibrated quantised copy of `model` and its placement.

    Args:
        model: a float module in any state; not changed.
        example: one input batch (B, ...) float32 an argument.
        keep_float: names of modules that stay float.
        quantise_heads: quantise the last layers before the outputs as well.

    Raises:
        InputError: there is nothing to quantise.
    """
    try:
        graph = float_graph(model, example)
    except UntraceableError as error:
        return _build_modules(model, example, str(error), frozenset(keep_float), quantise_heads)
    placement = place(graph, keep_float=keep_float, quantise_heads=quantise_heads)
    return apply(graph, placement), placement


def rebuild(model: nn.Module, example: tuple[Tensor, ...], placement: Placement) -> nn.Module:
    """Return the uncalibrated quantised copy of `model` that `placement` describes.

    Raises:
        ArtifactError: the model's code is no longer what was quantised.
    """
    if placement.method == "modules":
        return _convert_modules(model, placement)
    return apply(float_graph(model, example), placement)


def apply(graph: fx.GraphModule, placement: Placement) -> nn.Module:
    """Put the quantizers of `placement` into a traced graph, in place, uncalibrated."""
    _require_nodes(graph, placement)
    if not placement.weights:
        raise InputError("the model has no conv or linear layer that could be quantised")
    holder = nn.Module()
    graph.add_module(QUANTIZERS, holder)
    for row in placement.activations:
        holder.add_module(row.quantizer, modelopt.ActivationTensor())
        for tensor in row.tensors:
            _insert(graph, tensor, f"{QUANTIZERS}.{row.quantizer}")
    graph.graph.lint()
    graph.recompile()
    names = [f"{QUANTIZERS}.{row.quantizer}" for row in placement.activations]
    return modelopt.convert(graph, weights=[row.module for row in placement.weights], inputs=names)


def _require_nodes(graph: fx.GraphModule, placement: Placement) -> None:
    have = {node.name for node in graph.graph.nodes} | {str(node.target) for node in graph.graph.nodes}
    need = [t for row in placement.activations for t in row.tensors] + [row.module for row in placement.weights]
    if gone := [name for name in need if name not in have]:
        raise ArtifactError(
            f"the student's code has changed since it was quantised: {gone[0]!r} is gone", fix="Quantise it again"
        )


def _insert(graph: fx.GraphModule, tensor: str, quantizer: str) -> None:
    node = next(n for n in graph.graph.nodes if n.name == tensor)
    readers = [user for user in node.users if user.op != "output"]
    with graph.graph.inserting_after(node):
        quantised = graph.graph.call_module(quantizer, (node,))
    for reader in readers:
        reader.replace_input_with(node, quantised)


def _build_modules(
    model: nn.Module, example: tuple[Tensor, ...], reason: str, keep_float: frozenset[str], quantise_heads: bool
) -> tuple[nn.Module, Placement]:
    kinds = (*CONV_MODULES, nn.Linear)
    modules: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    heads = set() if quantise_heads else head_modules(model, example)
    floats = dict.fromkeys(sorted(heads), "output head") | dict.fromkeys(keep_float, "kept float on request")
    chosen = [name for name in _called(model, example, modules) if name not in floats]
    if not chosen:
        raise InputError("the model has no conv or linear layer that could be quantised")
    placement = Placement(
        "modules",
        reason,
        tuple(ActivationRow(name, (f"input of {name}",), (name,)) for name in chosen),
        tuple(WeightRow(n, type(modules[n]).__name__, int(modules[n].get_parameter("weight").shape[0]))
              for n in chosen),
        (),
        tuple(FloatRow(name, why) for name, why in floats.items()),
    )
    return _convert_modules(model, placement), placement


def _convert_modules(model: nn.Module, placement: Placement) -> nn.Module:
    names = [row.module for row in placement.weights]
    return modelopt.convert(copy.deepcopy(model).eval(), weights=names, inputs=names)


def _called(model: nn.Module, example: tuple[Tensor, ...], modules: dict[str, nn.Module]) -> list[str]:
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


def quantizer_name(placement: Placement, row: str) -> str:
    """Return the module name of the activation quantizer called `row` in the placement."""
    owner = row if placement.method == "modules" else f"{QUANTIZERS}.{row}"
    return f"{owner}.input_quantizer"


def tracing_example(io: IOSpec) -> tuple[Tensor, ...]:
    """Return one batch of fixed noise inside the value ranges: zeros would hide what tracing gets wrong."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for spec, zeros in zip(io.inputs, example_inputs(io), strict=True):
        low, high = spec.value_range or (-1.0, 1.0)
        examples.append((torch.rand(zeros.shape, generator=generator) * (high - low) + low).to(zeros.dtype))
    return tuple(examples)

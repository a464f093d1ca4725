"""Quantised modules from a placement: the same call makes a fresh one and rebuilds a stored one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from fmdeploy.errors import ArtifactError, InputError
from fmdeploy.iospec import IOSpec
from fmdeploy.models.outputs import example_inputs
from fmdeploy.progress import say
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.flow import Roles, is_sum, result, roles_of
from fmdeploy.quantize.fold import is_size
from fmdeploy.quantize.modules import convert_modules, place_modules
from fmdeploy.quantize.ops import Role
from fmdeploy.quantize.outliers import hold, measured, probe_graph, reading_columns, report
from fmdeploy.quantize.placement import Placement, Request
from fmdeploy.quantize.policy import layer_names, place
from fmdeploy.quantize.samples import CalibrationSet
from fmdeploy.quantize.trace import UntraceableError, float_graph, trace

QUANTIZERS = "quantizers"  # the submodule that holds every ActivationTensor of a traced model


def build(
    model: nn.Module, calibration_set: CalibrationSet, names: Sequence[str], request: Request = Request(),  # noqa: B008
    before: Callable[[fx.GraphModule], None] | None = None,
) -> tuple[nn.Module, Placement]:
    """Return an uncalibrated quantised copy of `model` and its placement.

    Args:
        model: a float module in any state; not changed.
        calibration_set: what the outlier probe measures on; its first sample is the example to trace with.
        names: the inputs of `model`, in the order of its arguments.
        request: what the user asks of the placement.
        before: changes the traced float graph in place before the placement is decided; not called for "modules".

    Raises:
        InputError: there is nothing to quantise.
        ConfigError: `request` names what the model does not have, or asks for what cannot be.
    """
    example = calibration_set.tensors(names, slice(0, 1))
    try:
        graph, method, reason = trace(model, example)
    except UntraceableError as error:
        placement = place_modules(model, calibration_set, names, request, str(error))
        return convert_modules(model, placement), placement
    if before is not None:
        before(graph)
    placement = replace(probed_placement(graph, calibration_set, names, request), method=method, reason=reason)
    return apply(graph, placement), placement


def probed_placement(
    graph: fx.GraphModule, calibration_set: CalibrationSet, names: Sequence[str], request: Request
) -> Placement:
    """Decide the placement of a traced graph, with the outlier probe's word in it; says what the probe saw."""
    placement = place(graph, request)
    if not placement.weights:
        raise InputError("the model has no conv or linear layer that could be quantised")
    roles = roles_of(graph)
    calls = {node.name: name for node, name in layer_names(graph, roles).items()}
    writers = {result(roles, node).name: name for node, name in layer_names(graph, roles).items()}
    columns = reading_columns(graph, roles)
    seen = probe_graph(graph, _probed(roles, placement), calibration_set, names)
    sums = {node.name for node in roles if is_sum(node)}
    held: dict[str, str] = {}
    found = hold(placement, measured(placement, seen, columns), calls, writers)
    while new := {name: why for name, why in found.items() if name not in held}:  # what the user wants in INT8 stays
        held |= new
        placement = place(graph, request, held)
        found = hold(placement, measured(placement, seen, columns), calls, writers)
    placement = replace(placement, measured=measured(placement, seen, columns))
    kept = {row.name: row.why for row in placement.floats if row.name in held}
    for line in report(placement.measured, sums, kept):
        say(line)
    return placement


def _probed(roles: Roles, placement: Placement) -> list[str]:
    """The quantised tensors, but of those that only moved just what a layer reads."""
    quantised = {tensor for row in placement.activations for tensor in row.tensors}
    return [node.name for node in roles if node.name in quantised
            and (roles[node] is not Role.PASS or any(roles[user] is Role.WEIGHTED for user in node.users))]


def rebuild(model: nn.Module, example: tuple[Tensor, ...], placement: Placement) -> nn.Module:
    """Return the uncalibrated quantised copy of `model` that `placement` describes.

    Raises:
        ArtifactError: the model's code is no longer what was quantised.
    """
    if placement.method == "modules":
        return convert_modules(model, placement)
    return apply(float_graph(model, example, placement.method), placement)


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
    readers = [user for user in node.users if user.op != "output" and not is_size(user)]
    with graph.graph.inserting_after(node):
        quantised = graph.graph.call_module(quantizer, (node,))
    for reader in readers:
        reader.replace_input_with(node, quantised)


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

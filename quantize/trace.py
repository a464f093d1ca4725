"""From a plain `nn.Module` to a float graph ready for quantisation: BatchNorm folded, no-ops gone.

The module need not know fmdeploy. It is read with torch.fx; where that cannot follow its `forward`, or would not see
the layers inside a container, with torch.export. What each could not follow is said with the user's source line.
Every graph is run beside the module before it is used.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from fmdeploy.errors import InputError
from fmdeploy.quantize.exported import exported_graph
from fmdeploy.quantize.fold import tidy
from fmdeploy.quantize.ops import WEIGHTED_MODULES, module_of
from fmdeploy.quantize.placement import Method

SAME_FLOAT = 1e-3  # largest difference, relative to the largest output, that folding may cause in float32
OTHER_BATCH = 3  # a graph must also be right for a batch that it was not traced with
HERE = Path(__file__).resolve().parent


class UntraceableError(InputError):
    """Neither torch.fx nor torch.export can follow this module's `forward`; the text names the source line."""


class Traced(NamedTuple):
    """A float graph, how it was made, and why not with torch.fx."""

    graph: fx.GraphModule
    method: Method
    reason: str | None


def float_graph(model: nn.Module, example: tuple[Tensor, ...], method: Method | None = None) -> fx.GraphModule:
    """Return the graph of `trace`."""
    return trace(model, example, method).graph


def trace(model: nn.Module, example: tuple[Tensor, ...], method: Method | None = None) -> Traced:
    """Trace `model` in evaluation mode, fold its BatchNorms and drop what does nothing at inference.

    Args:
        model: any module whose `forward` takes tensors positionally; it is not changed.
        example: one input batch (B, ...) float32 an argument; shapes are recorded as node.meta["tensor_meta"].
        method: how to trace, where that is known; else torch.fx is tried first, then torch.export.

    Raises:
        UntraceableError: `forward` branches on values, or the traced graph does not compute what `model` does.
        InputError: `forward` returns something that has no order, such as a dict.
    """
    source = copy.deepcopy(model).eval()
    _require_runs(source, example)
    if method == "export":
        return Traced(_checked(source, exported_graph, example), "export", None)
    try:
        return Traced(_checked(source, _fx_graph, example), "fx", None)
    except UntraceableError as error:
        if method == "fx":
            raise
        not_fx = error
    try:
        return Traced(_checked(source, exported_graph, example), "export", str(not_fx))
    except UntraceableError as error:
        raise UntraceableError(f"{not_fx}; {error}", fix="Only single Linear and Conv modules can be quantised"
                               ) from error


def _require_runs(model: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Whatever is wrong with the model itself shows before any tracing."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*example)
    except TypeError as error:
        raise InputError("the model takes another number of inputs", expected=f"{len(example)} (from the data)",
                         found=list(signature.parameters)) from error
    try:
        _run(model, example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InputError(f"the model does not run on its inputs ({_first_line(error)})", where=blocking_line(error)
                         ) from error


def _checked(
    source: nn.Module, read: Callable[[nn.Module, tuple[Tensor, ...]], fx.GraphModule], example: tuple[Tensor, ...]
) -> fx.GraphModule:
    """Trace with `read`, tidy up, and prove the graph on `example` and on another batch size."""
    name = "torch.export" if read is exported_graph else "torch.fx"
    try:
        graph = read(copy.deepcopy(source), example)
        tidy(graph, example)
    except UntraceableError:
        raise
    except Exception as error:  # both tracers let whatever the user's code raised on their stand-ins come through
        raise UntraceableError(f"{name} cannot follow this line ({_first_line(error)})", where=blocking_line(error)
                               ) from error
    if name == "torch.fx":
        _require_visible_layers(graph)
    _require_same(source, graph, example, name)
    if _runs(source, other := _other_batch(example)):
        _require_same(source, graph, other, name)
    with torch.no_grad():
        ShapeProp(graph).propagate(*example)
    return graph


def _first_line(error: BaseException) -> str:
    """The kind and the first words of an error; for artifacts, so without the numbers that torch gives its graphs."""
    text = (str(error).strip().splitlines() or [""])[0]
    if "Constraints violated" in text:  # torch.export names no line then
        text = "forward turns the batch size into a fixed number"
    return f"{type(error).__name__}: " + re.sub(r"<eval_with_key>\.\d+", "graph", text)[:90]


def _fx_graph(model: nn.Module, example: tuple[Tensor, ...]) -> fx.GraphModule:
    del example  # torch.fx needs none
    graph = fx.symbolic_trace(model)
    if any(node.op == "placeholder" and str(node.target).startswith("*") for node in graph.graph.nodes):
        raise UntraceableError("torch.fx sees all of *args as one value", where="forward")
    return graph


def blocking_line(error: BaseException) -> str:
    """Return "file.py:12 `source text`" of the innermost frame of `error` that is not torch's or fmdeploy's own."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename and Path(frame.filename).resolve().parent != HERE
        and frame.filename[0] != "<"
    ]
    if not frames:
        return "a line inside torch"
    last = frames[-1]
    text = (last.line or linecache.getline(last.filename, last.lineno or 0)).strip()
    return f"{Path(last.filename).name}:{last.lineno} `{text}`"


def _require_visible_layers(graph: fx.GraphModule) -> None:
    """Refuse a graph in which a container of torch.nn, such as nn.TransformerEncoder, hides conv or linear layers."""
    for node in graph.graph.nodes:
        module = module_of(graph, node)
        if module is None or isinstance(module, WEIGHTED_MODULES):
            continue
        if any(isinstance(inner, (*WEIGHTED_MODULES, nn.MultiheadAttention)) for inner in module.modules()):
            raise UntraceableError(f"torch.fx does not look into {type(module).__name__}", where=str(node.target))


def _other_batch(example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The example and scaled copies of it, as a batch of three."""
    return tuple(torch.cat([x[:1] * (1 - k / 8) if x.is_floating_point() else x[:1] for k in range(OTHER_BATCH)])
                 for x in example)


def _runs(model: nn.Module, example: tuple[Tensor, ...]) -> bool:
    """Whether the model takes a batch of this size: one that was written for a single size may refuse."""
    try:
        _run(model, example)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return True


def _require_same(model: nn.Module, graph: fx.GraphModule, example: tuple[Tensor, ...], name: str) -> None:
    expected = _run(model, example)
    try:
        found = _run(graph, example)
    except Exception as error:
        raise UntraceableError(f"the graph of {name} does not run ({type(error).__name__})",
                               where=f"{type(model).__name__}, batch of {len(example[0])}") from error
    for index, (wanted, got) in enumerate(zip(expected, found, strict=True)):
        difference = _relative_difference(wanted, got)
        if not difference <= SAME_FLOAT:
            raise UntraceableError(
                f"the graph of {name} computes something else (does forward write in place or use randomness?)",
                where=f"{type(model).__name__}, output {index}",
                expected=f"relative difference <= {SAME_FLOAT}",
                found=f"{difference:.3g}",
            )


def _relative_difference(wanted: Tensor, got: Tensor) -> float:
    if wanted.shape != got.shape:
        return float("inf")
    return float((wanted - got).abs().max()) / max(float(wanted.abs().max()), 1e-12)


def _run(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():  # clones, because a module that writes into its input must not change what others see
        return as_tuple(model(*(x.clone() for x in example)))


def as_tuple(outputs: Tensor | tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
    """Return what a model's `forward` gave as a tuple of tensors.

    Raises:
        InputError: it gave something else, such as a dict.
    """
    found = (outputs,) if isinstance(outputs, Tensor) else outputs
    if not isinstance(found, (tuple, list)) or not all(isinstance(each, Tensor) for each in found):
        raise InputError("the model's forward returns what has no order", expected="a tensor, or a tuple of tensors in "
                         "the order of the task's outputs", found=type(outputs).__name__)
    return tuple(found)

"""From a plain `nn.Module` to a graph ready for quantisation: torch.fx trace, BatchNorm folded, no-ops gone.

The module need not know fmdeploy. Where torch.fx cannot follow its `forward`, the error says which source line
stopped it; the caller then falls back to quantising single modules.
"""

from __future__ import annotations

import copy
import linecache
import operator
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from fmdeploy.errors import InputError
from fmdeploy.quantize.ops import ADDS, is_alias, module_of

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add, operator.imul: operator.mul, F.relu_: F.relu, torch.relu_: torch.relu,
    "add_": "add", "mul_": "mul", "relu_": "relu", "clamp_": "clamp", "sigmoid_": "sigmoid",
}
SAME_FLOAT = 1e-3  # largest difference, relative to the largest output, that folding may cause in float32


class UntraceableError(InputError):
    """torch.fx cannot follow this module's `forward`; the text names the source line."""


def float_graph(model: nn.Module, example: tuple[Tensor, ...]) -> fx.GraphModule:
    """Trace `model` in evaluation mode, fold its BatchNorms and drop what does nothing at inference.

    Args:
        model: any module whose `forward` takes tensors positionally; it is not changed.
        example: one input batch (B, ...) float32 an argument; shapes are recorded as node.meta["tensor_meta"].

    Raises:
        UntraceableError: `forward` branches on values, or the traced graph does not compute what `model` does.
    """
    source = copy.deepcopy(model).eval()
    graph_module = _trace(source)
    _check_arguments(graph_module, example)
    _drop_aliases(graph_module)
    _positional_adds(graph_module)
    _forbid_inplace(graph_module)
    _fold_batchnorms(graph_module)
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    _check_same(source, graph_module, example)
    with torch.no_grad():
        ShapeProp(graph_module).propagate(*example)
    return graph_module


def _trace(model: nn.Module) -> fx.GraphModule:
    try:
        return fx.symbolic_trace(model)
    except Exception as error:  # torch.fx lets whatever the user's code raised on a proxy come through
        raise UntraceableError(
            f"torch.fx cannot follow this line ({type(error).__name__}: {str(error).splitlines()[0][:90]})",
            where=blocking_line(error),
            fix="Only single Linear and Conv modules can be quantised",
        ) from error


def blocking_line(error: BaseException) -> str:
    """Return "file.py:12 `source text`" of the innermost frame of `error` that is not torch's or fmdeploy's own."""
    here = Path(__file__).resolve()
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename and Path(frame.filename).resolve() != here and frame.filename[0] != "<"
    ]
    if not frames:
        return "a line inside torch"
    last = frames[-1]
    text = (last.line or linecache.getline(last.filename, last.lineno or 0)).strip()
    return f"{Path(last.filename).name}:{last.lineno} `{text}`"


def _check_arguments(gm: fx.GraphModule, example: tuple[Tensor, ...]) -> None:
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder" and not node.args]
    if len(names) != len(example):
        raise InputError(
            "the model takes another number of inputs", expected=f"{len(example)} (from the data)", found=names
        )


def _drop_aliases(gm: fx.GraphModule) -> None:
    """Remove Identity, Dropout, contiguous(): in evaluation mode their output is the same tensor."""
    for node in list(gm.graph.nodes):
        if is_alias(gm, node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


def _positional_adds(gm: fx.GraphModule) -> None:
    """Spell torch.add(input=a, other=b) as torch.add(a, b), so that a residual is found however it is written."""
    for node in gm.graph.nodes:
        if node.target in ADDS and node.op in ("call_function", "call_method"):
            named = [node.kwargs[name] for name in ("input", "other") if name in node.kwargs]
            node.args = (*node.args, *named)
            node.kwargs = {name: value for name, value in node.kwargs.items() if name not in ("input", "other")}


def _forbid_inplace(gm: fx.GraphModule) -> None:
    """Make activations allocate their output: a quantizer between two readers must not be written through.

    Where the original relied on the overwriting, `_check_same` notices.
    """
    for node in gm.graph.nodes:
        module = module_of(gm, node)
        if module is not None and getattr(module, "inplace", False):
            setattr(module, "inplace", False)  # noqa: B010 - nn.Module declares no such attribute
        if "inplace" in node.kwargs:
            node.kwargs = {**node.kwargs, "inplace": False}
        node.target = OUT_OF_PLACE.get(node.target, node.target)


def _fold_batchnorms(gm: fx.GraphModule) -> None:
    """Fold every BatchNorm behind a conv or linear that nobody else reads (scale and shift go into weights)."""
    for node in list(gm.graph.nodes):
        norm = module_of(gm, node)
        if not isinstance(norm, BATCHNORMS) or not isinstance(node.args[0], fx.Node):
            continue
        producer = node.args[0]
        layer = module_of(gm, producer)
        if layer is None or len(producer.users) > 1 or _calls(gm, producer) > 1 or norm.running_mean is None:
            continue
        fused = _fused(layer, norm)
        if fused is not None:
            _set_module(gm, str(producer.target), fused)
            node.replace_all_uses_with(producer)
            gm.graph.erase_node(node)


def _calls(gm: fx.GraphModule, node: fx.Node) -> int:
    return sum(other.op == "call_module" and other.target == node.target for other in gm.graph.nodes)


def _fused(layer: nn.Module, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> nn.Module | None:
    if isinstance(layer, (*CONVS, *TRANSPOSED)):
        return fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, TRANSPOSED))
    if isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
        return fuse_linear_bn_eval(layer, norm)
    return None


def _set_module(gm: fx.GraphModule, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(gm.get_submodule(parent), leaf, module)


def _check_same(model: nn.Module, gm: fx.GraphModule, example: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        # Clones, because a module that writes into its input must not change what the other one sees.
        pairs = zip(as_tuple(model(*(x.clone() for x in example))), as_tuple(gm(*(x.clone() for x in example))),
                    strict=True)
        for index, (expected, found) in enumerate(pairs):
            error = float((expected - found).abs().max()) / max(float(expected.abs().max()), 1e-12)
            if not error <= SAME_FLOAT:
                raise UntraceableError(
                    "the traced graph computes something else (does forward write in place or use randomness?)",
                    where=f"{type(model).__name__}, output {index}",
                    expected=f"relative difference <= {SAME_FLOAT}",
                    found=f"{error:.3g}",
                )


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

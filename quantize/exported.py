"""The graph of a module from torch.export, in the vocabulary of the rest: what torch.fx would have given.

torch.export runs `forward` on stand-in tensors, so Python control flow over shapes and flags is no obstacle; only
branching on values is. It writes ATen operators, which are translated where their role matters to quantisation
(sums, ReLU, what only moves values) and left as they are where they stay float (LayerNorm, softmax, attention, GELU).
The batch size stays free.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

aten = torch.ops.aten
FULL = 2**63 - 1  # the end of a slice that goes to the end
SAME: dict[Any, Any] = {
    aten.add.Tensor: torch.add, aten.relu.default: F.relu, aten.cat.default: torch.cat,
    aten.flatten.using_ints: torch.flatten, aten.view.default: torch.reshape, aten.reshape.default: torch.reshape,
    aten._unsafe_view.default: torch.reshape, aten.permute.default: torch.permute,
    aten.transpose.int: torch.transpose, aten.squeeze.dim: torch.squeeze, aten.unsqueeze.default: torch.unsqueeze,
    aten.pixel_shuffle.default: F.pixel_shuffle, aten.pixel_unshuffle.default: F.pixel_unshuffle,
}
ALIASES = {aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default,
           aten.lift_fresh_copy.default, aten.feature_dropout.default}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}
POOLS = {aten.max_pool1d.default: F.max_pool1d, aten.max_pool2d.default: F.max_pool2d,
         aten.max_pool3d.default: F.max_pool3d}
RESIZES: dict[Any, str] = {aten.upsample_nearest1d.vec: "nearest", aten.upsample_nearest2d.vec: "nearest",
           aten.upsample_nearest3d.vec: "nearest", aten._upsample_nearest_exact2d.vec: "nearest-exact",
           aten.upsample_bilinear2d.vec: "bilinear", aten.upsample_bicubic2d.vec: "bicubic"}


def exported_graph(model: nn.Module, example: tuple[Tensor, ...]) -> fx.GraphModule:
    """Return the graph of `model` with the names of its parameters, for any batch size.

    Args:
        model: in evaluation mode.
        example: one input batch (B, ...) an argument.

    Raises:
        Exception: whatever torch.export or the module raised; `trace` reports it with the source line.
    """
    graph = _plain_module(_export(model, example))
    for node in list(graph.graph.nodes):
        _out_of_place(node)
        if node.op == "call_function":
            _translate(graph.graph, node)
    _follow_device(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _export(model: nn.Module, example: tuple[Tensor, ...]) -> fx.GraphModule:
    two = tuple(torch.cat([x[:1], x[:1]]) for x in example)  # with 1 or 0 torch.export would fix the batch size
    collection: Any = torch.export.ShapesCollection  # by tensor, whatever the signature: also for forward(*inputs)
    shapes = collection()
    for x in two:
        shapes[x] = {0: torch.export.Dim.DYNAMIC}
    with torch.no_grad(), _quiet():
        return torch.export.export(model, two, dynamic_shapes=shapes).module(check_guards=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export from printing its graphs where it fails: the error that it raises names the line."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _plain_module(program: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule whose train() and eval() work, and which takes and returns tensors as `forward` does."""
    graph = program.graph
    output = graph.output_node()
    if graph._codegen.pytree_info.out_spec.is_leaf():  # type: ignore[attr-defined]
        output.args = (output.args[0][0],)  # type: ignore[index]
    graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(program, graph)


def _out_of_place(node: fx.Node) -> None:
    """relu_ → relu: torch.export has already sent the later readers of the tensor here."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.endswith("_"):
        packet = getattr(aten, node.target._schema.name.removeprefix("aten::").removesuffix("_"), None)
        overload = getattr(packet, node.target._overloadname, None)
        node.target = overload or node.target


def _translate(graph: fx.Graph, node: fx.Node) -> None:
    if node.target is aten._assert_tensor_metadata.default:
        graph.erase_node(node)
    elif node.target in ALIASES or _keeps_all(node):
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    elif node.target is aten.sym_size.int:
        node.op, node.target = "call_method", "size"
    elif node.target is aten.hardtanh.default and tuple(node.args[1:]) == (0.0, 6.0):
        node.target, node.args = F.relu6, node.args[:1]
    elif node.target in SAME:
        node.target = SAME[node.target]
    elif node.target in POOLS:
        stride = node.args[2] if len(node.args) > 2 and node.args[2] else None
        node.target, node.args = POOLS[node.target], (*node.args[:2], stride, *node.args[3:])
    elif node.target in RESIZES:
        _resize(node)


def _keeps_all(node: fx.Node) -> bool:
    """Whether the result is the first input again: a cast to its own type, a slice from the start to the end."""
    if node.target is aten.slice.Tensor:
        start, end = (*node.args[2:4], None, None)[:2]
        return bool(start in (None, 0) and end in (None, FULL) and (len(node.args) < 5 or node.args[4] == 1))
    if node.target not in CASTS:
        return False
    before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
    return bool(before.dtype == after.dtype and before.device == after.device)


def _resize(node: fx.Node) -> None:
    """upsample_x(input, size, [align_corners,] scales) → F.interpolate."""
    mode: str = RESIZES[node.target]
    size, *rest = (*node.args[1:], *node.kwargs.values())
    scales = rest[-1] if rest else None
    corners = {"align_corners": rest[0]} if mode in ("bilinear", "bicubic") else {}
    node.target, node.args = F.interpolate, node.args[:1]
    node.kwargs = {"size": size, "scale_factor": scales, "mode": mode, **corners}


def _follow_device(graph: fx.GraphModule) -> None:
    """Constants are made where the input is: torch.export wrote down the device of this very run."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    makers = [node for node in graph.graph.nodes if isinstance(node.kwargs.get("device"), torch.device)]
    if not inputs or not makers:
        return
    with graph.graph.inserting_after(inputs[-1]):
        device = graph.graph.call_function(getattr, (inputs[0], "device"))
    for node in makers:
        node.kwargs = {**node.kwargs, "device": device}

"""What is done to every traced graph: one spelling of each operation, layers as modules, BatchNorm folded.

Each pass works on a graph in place and leaves what it computes unchanged; `trace` proves that afterwards.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from fmdeploy.quantize.lift import lift_layers
from fmdeploy.quantize.ops import ADDS, is_alias, module_of

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add, operator.imul: operator.mul, F.relu_: F.relu, torch.relu_: torch.relu,
    "add_": "add", "mul_": "mul", "relu_": "relu", "clamp_": "clamp", "sigmoid_": "sigmoid",
}


def tidy(graph: fx.GraphModule, example: tuple[Tensor, ...]) -> None:
    """Run every pass on a freshly traced graph, in place.

    Args:
        graph: from torch.fx or torch.export.
        example: one input batch (B, ...) an argument.
    """
    _drop_aliases(graph)
    _positional_inputs(graph)
    _forbid_inplace(graph)
    lift_layers(graph)
    _fold_batchnorms(graph)
    _drop_empty_sums(graph, example)
    _name_sums_apart(graph)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()


def _drop_aliases(gm: fx.GraphModule) -> None:
    """Remove Identity, Dropout, contiguous(): in evaluation mode their output is the same tensor."""
    for node in list(gm.graph.nodes):
        if is_alias(gm, node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            gm.graph.erase_node(node)


def _positional_inputs(gm: fx.GraphModule) -> None:
    """Spell conv(input=x) as conv(x) and torch.add(input=a, other=b) as torch.add(a, b), so that later passes agree."""
    for node in gm.graph.nodes:
        module = module_of(gm, node)
        if module is not None and node.kwargs:
            bound = inspect.signature(module.forward).bind(*node.args, **node.kwargs)
            node.args, node.kwargs = bound.args, bound.kwargs
        elif node.target in ADDS and node.op in ("call_function", "call_method"):
            named = [node.kwargs[name] for name in ("input", "other") if name in node.kwargs]
            node.args = (*node.args, *named)
            node.kwargs = {name: value for name, value in node.kwargs.items() if name not in ("input", "other")}


def _forbid_inplace(gm: fx.GraphModule) -> None:
    """Make activations allocate their output: a quantizer between two readers must not be written through.

    Whoever reads the overwritten tensor later gets the new one. What this misses, such as writing into a view,
    shows in the comparison with the module.
    """
    for node in gm.graph.nodes:
        module = module_of(gm, node)
        inplace = bool(node.kwargs.get("inplace")) or node.target in OUT_OF_PLACE
        if module is not None and getattr(module, "inplace", False):
            setattr(module, "inplace", False)  # noqa: B010 - nn.Module declares no such attribute
            inplace = True
        if "inplace" in node.kwargs:
            node.kwargs = {**node.kwargs, "inplace": False}
        if inplace:
            node.target = OUT_OF_PLACE.get(node.target, node.target)
            _redirect_later_readers(node)


def _redirect_later_readers(node: fx.Node) -> None:
    if node.args and isinstance(node.args[0], fx.Node):
        node.args[0].replace_all_uses_with(node, delete_user_cb=lambda user: node < user)


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
            if isinstance(fused.bias, nn.Parameter):  # torch freezes the bias of a layer that had none: QAT needs it
                fused.bias.requires_grad_(layer.get_parameter("weight").requires_grad)
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


def _drop_empty_sums(gm: fx.GraphModule, example: tuple[Tensor, ...]) -> None:
    """Remove x + 0 where the 0 is a tensor that no input decides: transformers add such a mask to every attention."""
    fixed = independent(gm)
    values: dict[fx.Node, Any] = {}

    class Notes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = found = super().run_node(n)
            return found

    sums = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in ADDS and len(n.args) == 2
            and sum(a in fixed for a in n.all_input_nodes) == 1 and len(n.all_input_nodes) == 2]
    if sums:
        with torch.no_grad():
            Notes(gm).run(*(x.clone() for x in example))
    for node in sums:
        zero, kept = sorted(node.all_input_nodes, key=lambda n: n not in fixed)
        if not values[zero].any() and values[kept].shape == values[node].shape:
            node.replace_all_uses_with(kept)
            gm.graph.erase_node(node)


def _name_sums_apart(gm: fx.GraphModule) -> None:
    """A sum is called by its node's name, a layer by its module's: the two must differ."""
    modules = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    for node in gm.graph.nodes:
        if node.target in ADDS and node.name in modules:
            node._rename(f"{node.name}_sum")


def independent(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose value no input decides: parameters, constants, and what is computed from them and from shapes."""
    fixed: set[fx.Node] = set()
    for node in gm.graph.nodes:
        computed = node.op in ("call_function", "call_method") and all(n in fixed for n in node.all_input_nodes)
        if computed or node.op == "get_attr" or is_size(node):
            fixed.add(node)
    return fixed


def is_size(node: fx.Node) -> bool:
    """Whether `node` asks for a size, a type or a device instead of computing with values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "device", "dtype", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim")

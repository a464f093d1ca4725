"""Functional layers as modules: `F.linear(x, self.weight)` becomes a call of an `nn.Linear` that owns the weight.

The module is named after the parameter: "attention.q_proj.weight" gives "attention.q_proj", "attn.in_proj_weight"
gives "attn.in_proj". Two calls with the same weight and bias are two calls of one module, as the author meant them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

aten = torch.ops.aten
CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn")
LAYERS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.linear: (nn.Linear, CONV[:3]),
    F.conv1d: (nn.Conv1d, CONV), F.conv2d: (nn.Conv2d, CONV), F.conv3d: (nn.Conv3d, CONV),
    F.conv_transpose1d: (nn.ConvTranspose1d, TRANSPOSED), F.conv_transpose2d: (nn.ConvTranspose2d, TRANSPOSED),
    F.conv_transpose3d: (nn.ConvTranspose3d, TRANSPOSED),
    aten.linear.default: (nn.Linear, CONV[:3]),
    aten.conv1d.default: (nn.Conv1d, CONV), aten.conv1d.padding: (nn.Conv1d, CONV),
    aten.conv2d.default: (nn.Conv2d, CONV), aten.conv2d.padding: (nn.Conv2d, CONV),
    aten.conv3d.default: (nn.Conv3d, CONV), aten.conv3d.padding: (nn.Conv3d, CONV),
    aten.conv_transpose1d.default: (nn.ConvTranspose1d, TRANSPOSED),
    aten.conv_transpose2d.input: (nn.ConvTranspose2d, TRANSPOSED),
    aten.conv_transpose3d.input: (nn.ConvTranspose3d, TRANSPOSED),
    aten.batch_norm.default: (nn.BatchNorm2d, NORM),
}
NORMS: dict[int, Callable[..., nn.Module]] = {
    2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d,
}
PRODUCTS = {torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.einsum, operator.matmul, aten.matmul.default,
            aten.mm.default, aten.bmm.default, aten.addmm.default, aten.einsum.default, "matmul", "mm", "bmm"}
TENSORS = ("weight", "bias", "running_mean", "running_var")


def lift_layers(gm: fx.GraphModule) -> None:
    """Turn every functional layer with parameters of its own into a module, in place; others stay as they are."""
    made: dict[tuple[Any, ...], str] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in LAYERS:
            continue
        kind, names = LAYERS[node.target]
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        if not _liftable(given) or not isinstance(given["input"], fx.Node):
            continue
        key = (kind, *(str(getattr(given.get(n), "target", given.get(n))) for n in names[1:]))
        if key not in made:
            made[key] = _owner(gm, given) if kind is nn.Linear else ""
        if not made[key]:
            made[key] = _free_name(gm, _layer_name(given, kind), node)
            gm.add_submodule(made[key], _module(gm, kind, given))
        with gm.graph.inserting_before(node):
            call = gm.graph.call_module(made[key], (given["input"],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)


def left_over(node: fx.Node, fixed: set[fx.Node]) -> bool:
    """Whether `node` is a conv or linear that `lift_layers` could not lift, or a product with a weight.

    Args:
        node: of a graph that has been through `lift_layers`.
        fixed: the nodes whose value no input decides.
    """
    if node.op == "call_function" and node.target in LAYERS:
        return LAYERS[node.target][0] is not nn.BatchNorm2d
    product = node.op in ("call_function", "call_method") and node.target in PRODUCTS
    return product and len({source in fixed for source in node.all_input_nodes}) == 2


def _liftable(given: dict[str, Any]) -> bool:
    """Whether every tensor but the input is a parameter or buffer, and nothing else is computed."""
    for name, value in given.items():
        if name in TENSORS:
            if isinstance(value, fx.Node) and value.op != "get_attr":
                return False
        elif name != "input" and isinstance(value, fx.Node):
            return False
    return isinstance(given.get("weight"), fx.Node) and not given.get("training", False)


def _owner(gm: fx.GraphModule, given: dict[str, Any]) -> str:
    """The nn.Linear, called elsewhere in the graph, that has this very weight and bias; "" where there is none."""
    wanted = {name: _tensor(gm, given[name]) for name in ("weight", "bias") if isinstance(given.get(name), fx.Node)}
    for name in dict.fromkeys(str(node.target) for node in gm.graph.nodes if node.op == "call_module"):
        module = gm.get_submodule(name)
        if isinstance(module, nn.Linear) and all(getattr(module, n) is wanted.get(n) for n in ("weight", "bias")):
            return name
    return ""


def _layer_name(given: dict[str, Any], kind: type[nn.Module]) -> str:
    fqn = str(given["weight"].target)
    parent, _, leaf = fqn.rpartition(".")
    if leaf == "weight" and parent:
        return parent
    if leaf.endswith("_weight"):
        return f"{parent}.{leaf.removesuffix('_weight')}".lstrip(".")
    return f"{fqn}_{kind.__name__.lower()}"


def _free_name(gm: fx.GraphModule, name: str, node: fx.Node) -> str:
    """`name`, unless a module there holds more than the tensors of `node`: it must not be overwritten."""
    own = {str(n.target) for n in node.all_input_nodes if n.op == "get_attr"}
    taken = {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")} - own
    clash = any(other == name or other.startswith(name + ".") for other in taken if not _batches(other))
    return f"{name}.{node.name}" if clash and not _is_module(gm, name) else f"{name}_{node.name}" if clash else name


def _batches(name: str) -> bool:
    return name.endswith(".num_batches_tracked")


def _is_module(gm: fx.GraphModule, name: str) -> bool:
    return any(n.op == "call_module" and n.target == name for n in gm.graph.nodes)


def _module(gm: fx.GraphModule, kind: type[nn.Module], given: dict[str, Any]) -> nn.Module:
    tensors = {n: _tensor(gm, given[n]) for n in TENSORS if isinstance(given.get(n), fx.Node)}
    weight = tensors["weight"]
    build: Callable[..., nn.Module] = kind
    if kind is nn.BatchNorm2d:
        rank = len(given["input"].meta["val"].shape)
        module = NORMS[rank](len(weight), eps=given["eps"], momentum=given["momentum"], device="meta")
        module.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))
    elif kind is nn.Linear:
        module = build(weight.shape[1], weight.shape[0], bias="bias" in tensors, device="meta")
    else:
        module = build(*_channels(kind, weight, given), tuple(weight.shape[2:]), bias="bias" in tensors, device="meta",
                       **{n: _plain(given[n]) for n in (*CONV[3:], "output_padding") if n in given})
    for name, tensor in tensors.items():
        if name.startswith("running"):
            setattr(module, name, tensor)
        else:
            setattr(module, name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False))
    return module.eval()


def _channels(kind: type[nn.Module], weight: Tensor, given: dict[str, Any]) -> tuple[int, int]:
    groups = int(given.get("groups", 1))
    transposed = kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    a, b = int(weight.shape[0]), int(weight.shape[1]) * groups
    return (a, b) if transposed else (b, a)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _tensor(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    parent, _, leaf = str(node.target).rpartition(".")
    found: Tensor = getattr(gm.get_submodule(parent), leaf)
    return found

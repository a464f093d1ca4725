"""How values flow through a traced graph: who computes a tensor, who reads it, what leads to an output.

Only tensors of floating point count. Sizes, types and devices that a graph asks for are no readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn

from fmdeploy.quantize.fold import independent, is_size
from fmdeploy.quantize.ops import ADDS, Role, module_of, role

Roles = dict[fx.Node, Role]
NORM_MODULES = (nn.LayerNorm, nn.RMSNorm)
NORMS = {F.layer_norm, F.rms_norm, torch.rms_norm, torch.layer_norm, torch.ops.aten.layer_norm.default,
         torch.ops.aten.rms_norm.default}


def roles_of(gm: fx.GraphModule) -> Roles:
    """The role of every node, in topological order; a sum with a constant is no residual and has the role FLOAT."""
    fixed = independent(gm)
    roles = {node: role(gm, node) for node in gm.graph.nodes}
    for node, its_role in roles.items():
        if its_role is Role.ADD and any(source in fixed for source in sources(node)):
            roles[node] = Role.FLOAT
    return roles


def odd_sums(gm: fx.GraphModule, roles: Roles) -> dict[fx.Node, str]:
    """Every sum of two tensors that is no residual, and why."""
    fixed, found = independent(gm), {}
    for node, its_role in roles.items():
        operands = sources(node)
        if node.op in ("call_function", "call_method") and node.target in ADDS and its_role is not Role.ADD \
                and len(operands) == 2:
            if any(operand in fixed for operand in operands):
                found[node] = "one side is a constant"
            elif node.kwargs.get("alpha", 1) != 1:
                found[node] = f"alpha is {node.kwargs['alpha']}: no INT8 kernel scales one side"
            else:
                found[node] = "broadcasts {} over {}".format(*sorted((_shape(n) for n in operands), key=len))
    return {node: why for node, why in found.items() if node not in fixed}


def _shape(node: fx.Node) -> str:
    return "x".join(map(str, node.meta["tensor_meta"].shape))


def is_values(node: fx.Node) -> bool:
    """Whether `node` gives one tensor of floating point."""
    dtype = getattr(node.meta.get("tensor_meta"), "dtype", None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def sources(node: fx.Node) -> list[fx.Node]:
    """The tensors that `node` computes with."""
    return [source for source in node.all_input_nodes if is_values(source)]


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that compute with `node`, results included."""
    return [user for user in node.users if not is_size(user)]


def kernel(roles: Roles, node: fx.Node) -> fx.Node:
    """The operation whose result `node` is, seen through ReLU and through operations that only move values."""
    while roles[node] in (Role.RELU, Role.PASS) and len(sources(node)) == 1:
        node = sources(node)[0]
    return node


def result(roles: Roles, node: fx.Node) -> fx.Node:
    """The tensor that one kernel writes for `node`: behind the ReLU, where a ReLU alone reads it."""
    found = readers(node)
    return found[0] if len(found) == 1 and roles[found[0]] is Role.RELU else node


def ends(roles: Roles, node: fx.Node) -> Iterator[fx.Node]:
    """Who reads `node` in the end: its readers, seen through operations that only move values."""
    for reader in readers(node):
        if roles[reader] is Role.PASS:
            yield from ends(roles, reader)
        else:
            yield reader


def is_norm(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is a LayerNorm or RMSNorm."""
    return isinstance(module_of(gm, node), NORM_MODULES) or node.target in NORMS


def is_sum(node: fx.Node) -> bool:
    """Whether `node` adds, residual or not."""
    return node.op in ("call_function", "call_method") and node.target in ADDS


def heads(roles: Roles) -> set[fx.Node]:
    """The last weighted layers before the outputs.

    Walking back from an output ends at every weighted layer. One met across a sum counts only if no other such layer
    is computed from it: of a residual stream that is itself an output, only the last branch is a head.
    """
    direct = _weighted_behind(roles, [n for n, r in roles.items() if r is Role.OUTPUT], lambda n: not is_sum(n))
    every = _weighted_behind(roles, [n for n, r in roles.items() if r is Role.OUTPUT], lambda n: True)
    return direct | {node for node in every - direct if not _descendants(node) & every}


def _weighted_behind(roles: Roles, start: list[fx.Node], cross: Callable[[fx.Node], bool]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo, seen = list(start), set(start)
    while todo:
        for source in todo.pop().all_input_nodes:
            if roles[source] is Role.WEIGHTED:
                found.add(source)
            elif source not in seen and cross(source):
                seen.add(source)
                todo.append(source)
    return found


def _descendants(node: fx.Node) -> set[fx.Node]:
    todo, seen = list(node.users), set(node.users)
    while todo:
        new = set(todo.pop().users) - seen
        seen |= new
        todo.extend(new)
    return seen


def normalised_streams(gm: fx.GraphModule, roles: Roles) -> set[fx.Node]:
    """Residual sums that belong to a stream that a LayerNorm reads somewhere, as in transformers and ConvNeXt."""
    sums = [node for node in roles if is_sum(node)]
    stream = {node: {node} for node in sums}
    for node in sums:
        for source in sources(node):
            other = source
            while roles[other] is Role.PASS and len(sources(other)) == 1:
                other = sources(other)[0]
            if other in stream:
                merged = stream[node] | stream[other]
                for member in merged:
                    stream[member] = merged
    normed = {node for node in sums if any(is_norm(gm, end) for end in ends(roles, node))}
    return {node for node in sums if stream[node] & normed}

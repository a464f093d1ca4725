"""What each node of a traced graph is to quantisation: one of seven roles, decided here only.

INPUT a model input · WEIGHTED a conv or linear module · ADD a sum of two activations of equal shape ·
RELU an activation that fuses into its producer · PASS values only move, so both sides share one scale ·
OUTPUT the results · FLOAT everything else (LayerNorm, softmax, attention products, means, GELU …).
"""

from __future__ import annotations

import operator
from enum import Enum

import torch
import torch.nn.functional as F
from torch import fx, nn

CONV_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_MODULES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED_MODULES = (*CONV_MODULES, *TRANSPOSED_MODULES, nn.Linear)

ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
RELU_MODULES = (nn.ReLU, nn.ReLU6)
RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, "relu", "relu_"}

ALIAS_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
ALIASES = {F.dropout, F.dropout2d, "contiguous", "detach", "clone"}

PASS_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool2d, nn.PixelShuffle, nn.PixelUnshuffle,
    nn.ChannelShuffle, nn.Flatten, nn.Unflatten, nn.UpsamplingNearest2d,
)
PASSES = {
    torch.cat, torch.concat, torch.concatenate, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool2d,
    F.pixel_shuffle, F.pixel_unshuffle, torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze,
    torch.unsqueeze, "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze",
}
NEAREST = {"nearest", "nearest-exact"}


class Role(Enum):
    """The role of a node."""

    INPUT = "input"
    WEIGHTED = "weighted"
    ADD = "add"
    RELU = "relu"
    PASS = "pass"
    OUTPUT = "output"
    FLOAT = "float"


def module_of(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that `node` calls, None where it calls none."""
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_alias(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` returns its first input unchanged in evaluation mode."""
    module = module_of(gm, node)
    if module is not None:
        return isinstance(module, ALIAS_MODULES)
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    return node.op in ("call_function", "call_method") and node.target in ALIASES


def role(gm: fx.GraphModule, node: fx.Node) -> Role:
    """Return the role of `node`; needs the shapes that `trace.float_graph` recorded."""
    if node.op == "placeholder":
        return Role.INPUT
    if node.op == "output":
        return Role.OUTPUT
    module = module_of(gm, node)
    if module is not None:
        return _module_role(module)
    if node.op not in ("call_function", "call_method"):
        return Role.FLOAT
    if node.target in RELUS:
        return Role.RELU
    if node.target in PASSES or _is_nearest(node.kwargs.get("mode"), node):
        return Role.PASS
    if node.target in ADDS and _sums_activations(node):
        return Role.ADD
    return Role.FLOAT


def _module_role(module: nn.Module) -> Role:
    if isinstance(module, WEIGHTED_MODULES):
        return Role.WEIGHTED
    if isinstance(module, RELU_MODULES):
        return Role.RELU
    nearest = isinstance(module, nn.Upsample) and module.mode in NEAREST
    return Role.PASS if nearest or isinstance(module, PASS_MODULES) else Role.FLOAT


def _is_nearest(mode: object, node: fx.Node) -> bool:
    # interpolate(input, size, scale_factor, mode, ...): mode may come fourth, and is "nearest" by default.
    if node.target is not F.interpolate:
        return False
    given = mode if mode is not None else (node.args[3] if len(node.args) > 3 else "nearest")
    return given in NEAREST


def _sums_activations(node: fx.Node) -> bool:
    """Whether both operands are computed tensors of one shape (a bias, a constant or a broadcast is not a residual)."""
    operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if len(node.args) != 2 or len(operands) != 2 or node.kwargs.get("alpha", 1) != 1:
        return False
    shapes = [getattr(arg.meta.get("tensor_meta"), "shape", None) for arg in operands]
    return shapes[0] is not None and shapes[0] == shapes[1] and all(arg.op != "get_attr" for arg in operands)


def is_conv(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` calls a convolution module."""
    return isinstance(module_of(gm, node), CONV_MODULES)


def is_transposed(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` calls a transposed convolution module."""
    return isinstance(module_of(gm, node), TRANSPOSED_MODULES)

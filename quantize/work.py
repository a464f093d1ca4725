"""What every kernel of a traced network has to do, for the latency model: which of them INT8 would make faster.

The kernels are those that an engine makes of the graph: a convolution or product with the activation behind it, a sum
inside the convolution that feeds it, everything else a pass over memory. Views cost nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, fx, nn

from fmdeploy.estimate.devices import Device
from fmdeploy.estimate.roofline import seconds
from fmdeploy.estimate.work import Precision, Work
from fmdeploy.quantize.flow import Roles, is_sum, is_values, readers, roles_of, sources
from fmdeploy.quantize.ops import CONV_MODULES, TRANSPOSED_MODULES, WEIGHTED_MODULES, Role, module_of
from fmdeploy.quantize.placement import Placement
from fmdeploy.quantize.trace import float_graph
from fmdeploy.training.device import evaluation_mode

# By the name of an operation in small letters, see `_name`.
PRODUCTS = {"matmul", "bmm", "scaleddotproductattention"}
VIEWS = {"flatten", "unflatten", "view", "reshape", "squeeze", "unsqueeze", "getitem", "expand", "dropout", "identity",
         "chunk", "split", "unbind", "select", "slice", "alias"}
KINDS = {"norm": "norm", "softmax": "softmax", "pool": "pool", "mean": "pool", "upsample": "resize",
         "interpolate": "resize", "permute": "copy", "transpose": "copy", "shuffle": "copy", "cat": "copy"}


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        work: What it does for one sample.
        group: The group whose precision it has, empty where it is float anyway.
        fused: Whether it runs inside another kernel: its bytes count, its launch does not.
    """

    work: Work
    group: str
    fused: bool = False

    def seconds(self, device: Device, quantised: Collection[str], batch: int) -> float:
        """Time on `device` where the groups `quantised` run in INT8 and all else in FP16."""
        precision: Precision = "int8" if self.group in quantised else "fp16"
        launch = device.launch if self.fused else 0.0
        return seconds(self.work, device, precision, batch) - launch


@dataclass(frozen=True)
class LatencyModel:
    """Predicted latency of one network on one device.

    Attributes:
        kernels: From `kernels_of`.
        device: With its power mode.
        batch: Samples a call.
    """

    kernels: tuple[Kernel, ...]
    device: Device
    batch: int = 1

    def microseconds(self, quantised: Collection[str]) -> float:
        """Predicted latency where the groups `quantised` run in INT8."""
        return 1e6 * sum(kernel.seconds(self.device, quantised, self.batch) for kernel in self.kernels)

    def gain(self, group: str) -> float:
        """Microseconds that keeping `group` in float costs; may be 0 or less where INT8 brings nothing."""
        mine = [kernel for kernel in self.kernels if kernel.group == group]
        return 1e6 * sum(k.seconds(self.device, (), self.batch) - k.seconds(self.device, (group,), self.batch)
                         for k in mine)


def kernels_of(student: nn.Module, placement: Placement, example: tuple[Tensor, ...]) -> tuple[Kernel, ...]:
    """The kernels of a student.

    Args:
        student: the float module.
        placement: how it was quantised. Where single modules were, only convolutions and linear layers are counted.
        example: one input batch (1, ...) an argument.
    """
    groups = {row.module for row in placement.weights}
    if placement.method == "modules":
        return tuple(Kernel(work, work.name if work.name in groups else "") for work in _called(student, example))
    graph = float_graph(student, example, placement.method)
    roles = roles_of(graph)
    found = []
    for node, its_role in roles.items():
        if its_role is Role.WEIGHTED:
            name, x, y = str(node.target), _shape(sources(node)[0]), _shape(node)
            found.append(Kernel(_layer(name, graph.get_submodule(name), x, y), name if name in groups else ""))
        elif is_sum(node) and its_role is Role.ADD:
            found.append(_sum(roles, node, placement))
        elif (work := _other(graph, roles, node)) is not None:
            found.append(Kernel(work, ""))
    return tuple(found)


def _called(module: nn.Module, example: tuple[Tensor, ...]) -> list[Work]:
    """Work of every conv and linear that one forward pass calls, in that order."""
    found: list[Work] = []

    def note(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found.append(_layer(name, layer, tuple(inputs[0].shape), tuple(output.shape)))

        return hook

    layers = {name: m for name, m in module.named_modules() if isinstance(m, WEIGHTED_MODULES)}
    handles = [m.register_forward_hook(note(name)) for name, m in layers.items()]
    try:
        with evaluation_mode(module):
            module(*example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _layer(name: str, layer: nn.Module, x: tuple[int, ...], y: tuple[int, ...]) -> Work:
    weight = layer.get_parameter("weight")
    grouped = isinstance(layer, CONV_MODULES) and layer.groups == layer.in_channels > 1
    kind = "gemm" if isinstance(layer, nn.Linear) else "depthwise" if grouped else "conv"
    # Every position of the result is one product with all of the kernel; a transposed one starts from its input's.
    positions = prod((x if isinstance(layer, TRANSPOSED_MODULES) else y)[1:]) // weight.shape[0]
    return Work(name, kind, weight.numel() * positions, weight.numel(), prod(x[1:]), prod(y[1:]), weight[0].numel(),
                weight.shape[0])


def _sum(roles: Roles, node: fx.Node, placement: Placement) -> Kernel:
    """A sum: inside the layer that feeds it and nothing else, it reads one more tensor; alone, two, and writes one."""
    fused = any(roles[source] is Role.WEIGHTED and len(readers(source)) == 1 for source in sources(node))
    size = _size(node)
    work = Work(node.name, "pointwise", reads=size if fused else 2 * size, writes=0 if fused else size)
    return Kernel(work, node.name if node.name in placement.adds else "", fused)


def _other(graph: fx.GraphModule, roles: Roles, node: fx.Node) -> Work | None:
    """The work of a node without weights; None where an engine makes no kernel of it."""
    operands = sources(node) if roles[node] not in (Role.INPUT, Role.OUTPUT, Role.RELU) and is_values(node) else []
    name = _name(graph, node)
    if not operands or name in VIEWS:
        return None
    if name in PRODUCTS and len(operands) > 1:
        return _product(node, operands)
    kind = next((word for key, word in KINDS.items() if key in name), "pointwise")
    if kind == "pointwise" and roles[node] is Role.FLOAT and all(_is_inside(roles, n, node) for n in operands):
        return None
    return Work(node.name, kind, reads=sum(map(_size, operands)), writes=_size(node))


def _is_inside(roles: Roles, source: fx.Node, node: fx.Node) -> bool:
    """Whether `node` can run where `source` is computed: an activation behind a layer, a gate behind its product."""
    alone = all(reader is node or roles[reader] is Role.FLOAT for reader in readers(source))
    return alone and roles[source] in (Role.WEIGHTED, Role.FLOAT)


def _product(node: fx.Node, operands: list[fx.Node]) -> Work:
    shared = _shape(operands[0])[-1]
    return Work(node.name, "matmul", _size(node) * shared, 0, sum(map(_size, operands)), _size(node), shared,
                _shape(node)[-1])


def _name(graph: fx.GraphModule, node: fx.Node) -> str:
    """What an operation is called, in small letters without an overload: `layernorm`, `matmul`, `mean`."""
    module = module_of(graph, node)
    name = type(module).__name__ if module is not None else str(getattr(node.target, "__name__", node.target))
    return name.lower().split(".")[0].replace("_", "")


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)


def _size(node: fx.Node) -> int:
    """Elements of one sample."""
    return prod(_shape(node)[1:])

"""What is switched together: a layer or a residual sum, with the activation quantizers that only it needs.

A calibrated module is taken apart by switching quantizers off, never by building it again. What stays on is what the
placement policy itself puts there when the other layers are kept in float, so that a switched module computes what a
fresh PTQ with those layers in float computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from fmdeploy.quantize import modelopt
from fmdeploy.quantize.build import quantizer_name
from fmdeploy.quantize.flow import result, roles_of, sources
from fmdeploy.quantize.placement import ADD, Placement, Request
from fmdeploy.quantize.policy import place
from fmdeploy.quantize.trace import float_graph


@dataclass(frozen=True)
class Group:
    """One layer with its weight, or one residual sum: `name` is what `keep_float` takes, `kind` its class or "add"."""

    name: str
    kind: str


@dataclass(frozen=True)
class Switchboard:
    """The quantizers of one calibrated module.

    Attributes:
        module: from `build.build`, calibrated.
        placement: its table.
        without: the placement when these groups are kept in float, too.
        tensors: sum → the tensors that it reads and writes.
    """

    module: nn.Module
    placement: Placement
    without: Callable[[Collection[str]], Placement]
    tensors: dict[str, frozenset[str]]

    @classmethod
    def of(
        cls, module: nn.Module, placement: Placement, student: nn.Module, example: tuple[Tensor, ...], request: Request
    ) -> Switchboard:
        """The switchboard of a module that was made from `student`.

        Args:
            module: from `build.build`, calibrated.
            placement: its table.
            student: the float module; its graph tells the policy what depends on what.
            example: one input batch (1, ...) an argument.
            request: what `placement` was made with.
        """
        if placement.method == "modules":
            return cls(module, placement, lambda kept: _fewer(placement, kept), {})
        graph = float_graph(student, example, placement.method)
        held = {row.name: row.why for row in placement.floats}

        def without(kept: Collection[str]) -> Placement:
            return place(graph, replace(request, keep_float=(*request.keep_float, *kept)), held)

        return cls(module, placement, without, _tensors_of_sums(graph, placement))

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups: layers in the order of the network, then sums."""
        return (*(Group(row.module, row.kind) for row in self.placement.weights),
                *(Group(name, ADD) for name in self.placement.adds))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all groups."""
        return tuple(group.name for group in self.groups)

    def quantised(self, chosen: Collection[str]) -> set[str]:
        """Those of `chosen` that are quantised when all others are not: a sum needs an INT8 layer that feeds it."""
        left = self._left(chosen)
        return {row.module for row in left.weights} | set(left.adds)

    @contextmanager
    def only(self, chosen: Collection[str]) -> Iterator[None]:
        """Quantise the groups `chosen` alone inside this context; a single sum is quantised whatever feeds it."""
        wanted = self._quantizers(chosen)
        own = dict(modelopt.quantizers(self.module))
        for name, quantizer in own.items():
            if name not in wanted:
                quantizer.disable_quant()
        try:
            yield
        finally:
            for quantizer in own.values():
                quantizer.enable_quant()

    def _left(self, chosen: Collection[str]) -> Placement:
        return self.without([name for name in self.names if name not in chosen])

    def _quantizers(self, chosen: Collection[str]) -> set[str]:
        left = self._left(chosen)
        tensors = {tensor for row in left.activations for tensor in row.tensors}
        if len(chosen) == 1:
            tensors |= self.tensors.get(next(iter(chosen)), frozenset())
        rows = [row.quantizer for row in self.placement.activations if tensors & set(row.tensors)]
        return ({quantizer_name(self.placement, row) for row in rows}
                | {f"{row.module}.weight_quantizer" for row in left.weights})


def _tensors_of_sums(graph: fx.GraphModule, placement: Placement) -> dict[str, frozenset[str]]:
    roles = roles_of(graph)
    sums = [node for node in roles if node.name in placement.adds]
    return {node.name: frozenset(n.name for n in (*sources(node), result(roles, node))) for node in sums}


def _fewer(placement: Placement, kept: Collection[str]) -> Placement:
    """Where single modules are quantised, they do not depend on each other."""
    return replace(placement, weights=tuple(row for row in placement.weights if row.module not in kept),
                   activations=tuple(row for row in placement.activations if row.quantizer not in kept))

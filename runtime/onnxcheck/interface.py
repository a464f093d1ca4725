"""Rules on what was promised: inputs and outputs as in io.json, a static batch of 1, and the INT8 that was declared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fmdeploy.errors import ModelFileError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.runtime.onnxcheck.graphview import View
from fmdeploy.runtime.onnxcheck.model import Value
from fmdeploy.runtime.onnxcheck.operators import DQ, Q
from fmdeploy.runtime.onnxcheck.tensors import shown

ELEM_TYPES = {"float32": 1, "float16": 10, "uint8": 2, "int64": 7}
NAMES = {number: name for name, number in ELEM_TYPES.items()} | {11: "float64", 3: "int8", 6: "int32", 9: "bool"}
AGAIN = "Export the bundle again"


@dataclass(frozen=True)
class Declared:
    """What the bundle says about one variant's INT8.

    Attributes:
        int8: Whether it calls itself INT8.
        pairs: Number of Q/DQ pairs, where the bundle's metrics say it.
        nodes: Names of the products that the placement put into INT8, where the bundle names them.
    """

    int8: bool = False
    pairs: int | None = None
    nodes: tuple[str, ...] = ()


def check_interface(view: View, io: IOSpec) -> None:
    """Rows M20 and M21: names, order, types and shapes are those of io.json, with a static batch of 1.

    Raises:
        ModelFileError: Names the input or output.
    """
    for kind, values, specs in (("inputs", view.graph.inputs, io.inputs), ("outputs", view.graph.outputs, io.outputs)):
        names, wanted = [value.name for value in values], [spec.name for spec in specs]
        if names != wanted:
            raise ModelFileError(f"has other {kind} than io.json", expected=wanted,
                                 found=[shown(name) for name in names[:16]], fix=AGAIN)
        for value, spec in zip(values, specs, strict=True):
            _check_value(value, spec)


def _check_value(value: Value, spec: TensorSpec) -> None:
    where = f"tensor {shown(value.name)}"
    if not value.is_tensor or value.elem_type != ELEM_TYPES[spec.dtype]:
        raise ModelFileError("has another type than in io.json", where=where, expected=spec.dtype, fix=AGAIN,
                             found=NAMES.get(value.elem_type, f"data type {value.elem_type}"))
    if value.dims is None or any(not isinstance(size, int) for size in value.dims):
        raise ModelFileError("has a size that is not fixed", where=where, expected=(1, *spec.shape),
                             found=value.dims, fix="Export with a static batch of 1")
    if value.dims != (1, *spec.shape):
        raise ModelFileError("has another shape than in io.json", where=where, expected=(1, *spec.shape),
                             found=value.dims, fix=AGAIN)


def check_quantised(view: View, declared: Declared) -> None:
    """Row M19: what is called INT8 is INT8, as much of it as the bundle declares.

    Raises:
        ModelFileError: Says how much of it is.
    """
    if not declared.int8:
        return
    products = view.products()
    quantised = {product.node.name for product in products if product.quantised}
    number = sum(product.quantised for product in products)
    share = f"{number / max(1, len(products)):.0%} quantised ({number} of {len(products)} products)"
    pairs = min(view.count(Q), view.count(DQ))
    if pairs == 0 or number == 0:
        raise ModelFileError(f"is declared INT8, {share}", expected="Q/DQ pairs around its products",
                             found=f"{pairs} pairs", fix=AGAIN)
    if declared.pairs is not None and pairs != declared.pairs:
        raise ModelFileError(f"is declared INT8, {share}", expected=f"{declared.pairs} Q/DQ pairs", found=pairs,
                             fix=AGAIN)
    if missing := _missing(declared.nodes, quantised):
        raise ModelFileError(f"is declared INT8, {share}", where=f"node {shown(missing[0])}",
                             expected=f"{len(declared.nodes)} placed products in INT8",
                             found=f"{len(missing)} in float", fix=AGAIN)


def _missing(wanted: Iterable[str], found: set[str]) -> list[str]:
    return [name for name in wanted if name not in found]

"""Section on TensorRT: what a real compiler made of the bundle's files, layer by layer, without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fmdeploy.evaluate.report.sources import Sources
from fmdeploy.evaluate.report.words import count, mebibytes

FILE = "tensorrt.json"


@dataclass(frozen=True)
class LayerRow:
    """One engine layer: types of what it reads, holds and writes, and the ONNX nodes it came from."""

    name: str
    kind: str
    precision: str
    inputs: str
    weights: str
    outputs: str
    nodes: str


@dataclass(frozen=True)
class Compiled:
    """One file of the bundle."""

    file: str
    engine: str
    layers: str
    products: str
    rows: tuple[LayerRow, ...]


@dataclass(frozen=True)
class TensorRt:
    """The section: who compiled, what that proves and what not, and what came of every file."""

    compiler: str
    proves: str
    not_proven: str
    files: tuple[Compiled, ...]


def tensorrt_section(sources: Sources) -> TensorRt | str:
    """What the bundle's compile check found, or why it is not there."""
    if sources.bundle is None:
        return "no BUNDLE"
    if not sources.bundle.has(FILE):
        return "the bundle was exported without TensorRT-RTX, or with --no-verify-tensorrt"
    found = sources.bundle.json(FILE)
    return TensorRt(f"{found['api']} {found['version']}", found["proves"], found["not_proven"],
                    tuple(_compiled(variant, report) for variant, report in found["files"].items()))


def _compiled(variant: str, report: Mapping[str, Any]) -> Compiled:
    products = ", ".join(f"{number} {precision}" for precision, number in report["counts"].items())
    return Compiled(f"model.{variant}.onnx", mebibytes(report["engine_bytes"]), count(len(report["layers"])), products,
                    tuple(_row(layer) for layer in report["layers"]))


def _row(layer: Mapping[str, Any]) -> LayerRow:
    return LayerRow(layer["name"], layer["kind"], layer["precision"] or "–", *(
        ", ".join(layer[key]) or "–" for key in ("inputs", "weights", "outputs", "nodes")))

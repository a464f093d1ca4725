"""`card.md`: what is in a bundle, where it came from and how good it is, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fmdeploy.artifact import Artifact
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.manifest import Parent
from fmdeploy.models.saved import RECIPE
from fmdeploy.task import Task


def model_card(
    model: Artifact, task: Task, metrics: Mapping[str, Any], compiled: Mapping[str, Any] | None = None
) -> str:
    """Return the card's Markdown text.

    Args:
        model: The STUDENT or QUANTIZED that was exported.
        task: Its task.
        metrics: What `metrics.json` of the bundle holds.
        compiled: What `tensorrt.json` holds; None where nothing was compiled.
    """
    return "\n".join([*_head(model, task), *_io(task.io), *_variants(metrics), *_kept(metrics),
                      *_compiled(compiled), *_lineage(model), *_limits()]) + "\n"


def _head(model: Artifact, task: Task) -> Iterator[str]:
    recipe = model.json(RECIPE)
    yield f"# {task.name}: {recipe['name'] or 'student'}"
    yield ""
    yield f"Exported from the {model.kind.value} `{model.digest[:12]}`; {recipe['parameters']:,} parameters."


def _io(io: IOSpec) -> Iterator[str]:
    yield from ("", "## Inputs and outputs", "", "| | name | shape | values |", "|---|---|---|---|")
    for role, specs in (("in", io.inputs), ("out", io.outputs)):
        yield from (f"| {role} | {spec.name} | {spec.dtype} {list(spec.shape)} {spec.layout} | {_values(spec)} |"
                    for spec in specs)
    yield from ("", f"Preprocessing: {io.preprocessing}.")


def _values(spec: TensorSpec) -> str:
    return f"{spec.value_range[0]:g} to {spec.value_range[1]:g}" if spec.value_range else "any"


def _variants(metrics: Mapping[str, Any]) -> Iterator[str]:
    name = metrics["metric"]
    yield from ("", "## Files", "", f"| file | kB | against | SQNR dB | {name} | {name} of reference |",
                "|---|---|---|---|---|---|")
    for variant, row in metrics["variants"].items():
        parity = row["parity"]
        ratios = ", ".join(f"{output} {value:.1f}" for output, value in parity["sqnr_db"].items())
        yield (f"| model.{variant}.onnx | {row['bytes'] / 1000:.0f} | {parity['against']} | {ratios} | "
               f"{_number(parity[name])} | {_number(parity[f'{name}_of_reference'])} |")
    yield from ("", f"Measured on {metrics['parity_samples']} samples of the split `{metrics['parity_split']}`.")


def _kept(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What the overflow probe left in FP32."""
    rows = {variant: row["fp32_nodes"] for variant, row in metrics["variants"].items() if row.get("fp32_nodes")}
    if not rows:
        return
    yield from ("", "## Kept in FP32", "", "| file | node | because of | number |", "|---|---|---|---|")
    for variant, kept in rows.items():
        yield from (f"| model.{variant}.onnx | {row['node']} ({row['op']}) | {row['tensor']}: {row['why']} | "
                    f"{row['value']} |" for row in kept)


def _compiled(compiled: Mapping[str, Any] | None) -> Iterator[str]:
    yield from ("", "## TensorRT", "")
    if compiled is None:
        yield "The TensorRT files were not compiled."
        return
    for variant, report in compiled["files"].items():
        counts = ", ".join(f"{number} {name}" for name, number in report["counts"].items())
        yield (f"- model.{variant}.onnx: {compiled['api']} {compiled['version']} builds {len(report['layers'])} "
               f"layers; convolutions and matrix products: {counts}.")
    yield from ("", f"{compiled['proves']} {compiled['not_proven']}")


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _lineage(model: Artifact) -> Iterator[str]:
    yield from ("", "## Made from", "")

    def walk(inputs: Mapping[str, Parent], depth: int) -> Iterator[str]:
        for role, parent in sorted(inputs.items()):
            yield f"{'  ' * depth}- {role}: {parent.kind.value} `{parent.digest[:12]}` by `{parent.stage}`"
            yield from walk(parent.inputs, depth + 1)

    yield f"- {model.kind.value} `{model.digest[:12]}` by `{model.manifest.stage}`"
    yield from walk(model.inputs, 1)


def _limits() -> Iterator[str]:
    yield from (
        "", "## Limits", "",
        "- The numbers hold for data like the dataset above; `fmdeploy check` measures every budget on the device.",
        "- INT8 turns NaN into plausible numbers: feed it through the runtime, whose guards stand before quantisation.",
        "- `model.int8.onnx` is spelled for TensorRT, `model.int8-cpu.onnx` for ONNX Runtime; both hold one grid.",
    )

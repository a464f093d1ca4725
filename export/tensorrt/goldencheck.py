"""Three answers to the golden inputs side by side: torch, ONNX Runtime, the engine.

The task's metric decides, together with a floor on the SQNR that every output must keep against ONNX Runtime.
Nothing is compared element by element: different kernels round differently, and of INT8 a whole level at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.errors import ArtifactError, GateError
from fmdeploy.evaluate.evaluation import evaluate
from fmdeploy.evaluate.sqnr import cosine, finite_db, sqnr_db
from fmdeploy.runtime.backends.protocol import Backend
from fmdeploy.runtime.bundle import Bundle
from fmdeploy.strictjson import finite_or_none
from fmdeploy.task import Metric, Samples, Task

TENSORS = "golden.safetensors"
METRIC_TOLERANCE = 0.01  # largest change of the task's metric, absolute; on few samples two of them may change sides
TORCH = {"fp32": "fp32", "fp16": "fp32", "int8": "int8"}  # variant → which torch module it was made from


@dataclass(frozen=True)
class GoldenSamples:
    """The golden inputs and targets as a split of samples, see `task.Samples`."""

    inputs: Arrays
    targets: Arrays

    @property
    def ids(self) -> tuple[str, ...]:
        """A number each."""
        return tuple(str(k) for k in range(len(self)))

    @property
    def groups(self) -> Array:
        """(N,) each one its own."""
        return np.arange(len(self))

    @property
    def slices(self) -> Mapping[str, Array]:
        """None."""
        return {}

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def batch(self, index: Array) -> tuple[Arrays, Arrays]:
        """Inputs and targets of the samples `index` (B,)."""
        return ({name: array[index] for name, array in self.inputs.items()},
                {name: array[index] for name, array in self.targets.items()})


@dataclass(frozen=True)
class Agreement:
    """Two answers to the golden inputs: per output SQNR and cosine, and the metric of both."""

    pair: str
    sqnr_db: dict[str, float]
    cosine: dict[str, float]
    value: float
    reference_value: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        plain = {k: finite_or_none(v) for k, v in self.cosine.items()}
        return {"pair": self.pair, "sqnr_db": {k: finite_db(v) for k, v in self.sqnr_db.items()}, "cosine": plain,
                "metric": finite_or_none(self.value), "metric_of_reference": finite_or_none(self.reference_value)}

    def __str__(self) -> str:
        ratios = ", ".join(f"{name} {value:.1f} dB" for name, value in self.sqnr_db.items())
        return f"{self.pair}: {ratios}; metric {self.value:.4f}, reference {self.reference_value:.4f}"


def three_way(bundle: Bundle, variant: str, backend: Backend, task: Task) -> tuple[Agreement, ...]:
    """Compare the engine with ONNX Runtime and with torch, and these two with each other.

    Args:
        bundle: Holds the golden inputs, targets, and both stored answers.
        variant: What the engine was built from.
        backend: The engine.
        task: Its first metric is evaluated.

    Raises:
        ArtifactError: the bundle stores no answers of this variant.
    """
    tensors = bundle.artifact.tensors(TENSORS)
    samples: Samples = GoldenSamples(bundle.golden.inputs, {
        name.removeprefix("target."): array for name, array in tensors.items() if name.startswith("target.")})
    answers = {"engine": run_golden(bundle, backend), **stored_answers(bundle, variant)}
    metric = task.metrics()[0]
    pairs = (("engine", "onnxruntime"), ("engine", "torch"), ("onnxruntime", "torch"))
    return tuple(agreement(a, b, answers, samples, metric) for a, b in pairs)


def stored_answers(bundle: Bundle, variant: str) -> dict[str, Arrays]:
    """What ONNX Runtime and torch said to the golden inputs, (N, ...) by output.

    Raises:
        ArtifactError: the bundle stores no answers, or no tolerance, of this variant.
    """
    if variant not in bundle.golden.index.variants:
        raise ArtifactError("holds no golden tolerance of this variant", where=bundle.artifact.root, expected=variant,
                            found=", ".join(bundle.golden.index.variants), fix="Export the bundle again")
    tensors = bundle.artifact.tensors(TENSORS)
    return {"onnxruntime": _stored(bundle, tensors, f"output.{variant}."),
            "torch": _stored(bundle, tensors, f"reference.{TORCH.get(variant, variant)}.")}


def _stored(bundle: Bundle, tensors: Arrays, prefix: str) -> Arrays:
    found = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    if set(found) != {spec.name for spec in bundle.io.outputs}:
        raise ArtifactError("holds no golden answers of this variant", where=bundle.artifact.root,
                            expected=f"{prefix}NAME in {TENSORS}", fix="Export the bundle again")
    return found


def run_golden(bundle: Bundle, backend: Backend) -> Arrays:
    """The backend's answers to all golden inputs, (N, ...) by name."""
    rows = []
    for number in range(len(bundle.golden)):
        feeds = {name: np.ascontiguousarray(array[None]) for name, array in bundle.golden.sample(number).items()}
        rows.append(backend.run(feeds))
    return {spec.name: np.concatenate([row[k] for row in rows]) for k, spec in enumerate(bundle.io.outputs)}


def agreement(one: str, other: str, answers: Mapping[str, Arrays], samples: Samples, metric: Metric) -> Agreement:
    """Put two stored answers beside each other."""
    found, reference = answers[one], answers[other]
    values = [_value(said, samples, metric) for said in (found, reference)]
    return Agreement(f"{one} against {other}", {n: sqnr_db(reference[n], found[n]) for n in reference},
                     {n: cosine(reference[n], found[n]) for n in reference}, values[0], values[1])


def _value(said: Arrays, samples: Samples, metric: Metric) -> float:
    """The metric of stored answers: all samples are one batch, so what is asked does not matter."""
    return evaluate(lambda _: said, samples, (metric,), batch_size=len(samples)).value(metric)


def require_agreement(found: Agreement, floor_db: float, num_samples: int) -> None:
    """Let the golden vectors decide.

    Args:
        found: The engine against ONNX Runtime.
        floor_db: Smallest SQNR that the bundle allows for this variant.
        num_samples: Golden samples.

    Raises:
        GateError: the metric moved too far, or an output is below the floor (or not finite).
    """
    tolerance = max(METRIC_TOLERANCE, 2 / num_samples)
    change = abs(found.value - found.reference_value)
    both_undefined = math.isnan(found.value) and math.isnan(found.reference_value)
    if not both_undefined and not change <= tolerance:
        raise GateError(f"{found.pair} on the golden inputs: the metric moved", expected=f"at most {tolerance:g}",
                        found=f"{change:.4f}")
    for name, ratio in found.sqnr_db.items():
        if not ratio >= floor_db:
            raise GateError(f"{found.pair} on the golden inputs: output {name!r} differs",
                            expected=f">= {floor_db:g} dB", found=f"{ratio:.1f} dB")

"""Parity: every file of a bundle against what it was made from, in SQNR per output and in the task's metric.

    fp32       torch float            what simplification and another runtime change: nothing to speak of
    fp16       torch float            11 bits in every tensor
    qdq        torch fake-quant       the FP32-typed Q/DQ graph as it is written (graph optimisation off)
    int8       torch fake-quant       FP16 between the INT8 layers, convolutions unquantised before their adds
    int8-cpu   qdq                    as ONNX Runtime really runs it here: integer arithmetic, rounded biases

The last three cannot be equal: a sum that lands on the other side of a rounding step moves a tensor by one level, and
later layers spread it. Even torch against torch with another convolution algorithm gives 49 dB there. Of `int8` the
FP16 tensors are rounded to 11 bits before they are quantised to 8, which one value in sixteen or so feels; and it has
fewer roundings than the module it came from (1.1 dB closer to the float student on the demo task).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fmdeploy.errors import GateError
from fmdeploy.evaluate.evaluation import evaluate
from fmdeploy.evaluate.sqnr import cosine, finite_db, sqnr_db
from fmdeploy.strictjson import finite_or_none
from fmdeploy.task import Arrays, Samples, Task

Predict = Callable[[Arrays], Arrays]
# Smallest values over both BEV students, the digits student and an untrained one: fp32 125, fp16 57, qdq 45, int8 32,
# int8-cpu 37 dB. What is broken lies far below: one DequantizeLinear with twice its scale leaves 15 dB at most.
FLOOR_DB = {"fp32": 60.0, "fp16": 45.0, "qdq": 40.0, "int8": 25.0, "int8-cpu": 30.0}
# Where torch.fx cannot follow the student, only single modules are quantised: activations between them stay float, and
# every sum that the file rounds differently meets a rounding step again. There the floor is lower.
MODULES_FLOOR_DB = 35.0
METRIC_TOLERANCE = 0.01  # largest change of the primary metric, absolute


@dataclass(frozen=True)
class Parity:
    """One variant against its reference, on the same samples."""

    variant: str
    against: str
    sqnr_db: dict[str, float]
    metric: str
    value: float
    reference_value: float
    num_samples: int
    cosine: dict[str, float] = field(default_factory=dict)
    by_modules: bool = False
    """Whether the student was quantised module by module, see MODULES_FLOOR_DB."""

    def __str__(self) -> str:
        ratios = ", ".join(f"{output} {value:.1f} dB" for output, value in self.sqnr_db.items())
        return (f"{self.variant} against {self.against}: {ratios}; "
                f"{self.metric} {self.value:.4f}, reference {self.reference_value:.4f}")

    @property
    def floor_db(self) -> float:
        """Smallest SQNR that passes."""
        return MODULES_FLOOR_DB if self.by_modules and self.variant == "qdq" else FLOOR_DB[self.variant]

    @property
    def metric_tolerance(self) -> float:
        """Largest change of the metric that passes: on few samples, two of them may change sides."""
        return max(METRIC_TOLERANCE, 2 / self.num_samples)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "against": self.against,
            "sqnr_db": {name: finite_db(value) for name, value in self.sqnr_db.items()},
            "cosine": {name: finite_or_none(value) for name, value in self.cosine.items()},
            "floor_db": self.floor_db,
            self.metric: finite_or_none(self.value),
            f"{self.metric}_of_reference": finite_or_none(self.reference_value),
            "samples": self.num_samples,
        }


@dataclass(frozen=True)
class Outputs:
    """What one model said about all samples: outputs by name (N, ...) and the primary metric's value."""

    arrays: Arrays
    value: float


def outputs_of(predict: Predict, samples: Samples, task: Task) -> Outputs:
    """Run a model over all samples once and keep its outputs."""
    kept: list[Arrays] = []

    def remember(inputs: Arrays) -> Arrays:
        kept.append(predict(inputs))
        return kept[-1]

    metric = task.metrics()[0]
    value = evaluate(remember, samples, (metric,), batch_size=32).value(metric)
    return Outputs({name: np.concatenate([part[name] for part in kept]) for name in kept[0]}, value)


def compare(
    variant: str, found: Outputs, against: str, reference: Outputs, task: Task, *, by_modules: bool = False
) -> Parity:
    """Put two models' outputs on the same samples beside each other."""
    ratios = {name: sqnr_db(reference.arrays[name], found.arrays[name]) for name in reference.arrays}
    cosines = {name: cosine(reference.arrays[name], found.arrays[name]) for name in reference.arrays}
    count = len(next(iter(found.arrays.values())))
    return Parity(variant, against, ratios, task.metrics()[0].name, found.value, reference.value, count, cosines,
                  by_modules)


def require_parity(parity: Parity) -> None:
    """Check one comparison.

    Raises:
        GateError: an output's SQNR is below the floor, or the metric moved too far.
    """
    for name, ratio in parity.sqnr_db.items():
        if not ratio >= parity.floor_db:
            raise GateError(f"model.{parity.variant}.onnx differs from {parity.against} in output {name!r}",
                            expected=f">= {parity.floor_db:g} dB", found=f"{ratio:.1f} dB")
    change = abs(parity.value - parity.reference_value)
    both_undefined = np.isnan(parity.value) and np.isnan(parity.reference_value)  # such as IoU without any vehicle
    if not both_undefined and not change <= parity.metric_tolerance:
        raise GateError(f"model.{parity.variant}.onnx differs from {parity.against} in {parity.metric}",
                        expected=f"at most {parity.metric_tolerance:g}", found=f"{change:.4f}")

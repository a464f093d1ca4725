"""`auto`: the calibrator of each tensor is the one that costs the model's outputs least.

One tensor at a time is quantised, everything else stays float, and the outputs are compared with the float model's.
This is measured on calibration samples that the candidate ranges have not seen, where there are enough of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fmdeploy.evaluate.sqnr import finite_db, power_db
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.grid import STEPS, fp16_amax
from fmdeploy.quantize.observe import fastest_way, run
from fmdeploy.quantize.ranges import Candidate
from fmdeploy.quantize.samples import CalibrationSet

ENOUGH = 16  # samples from which on a quarter is kept for measuring
RUNS = 2048  # forward passes of one sample that all measurements together may take, about
MOST, LEAST = 32, 4  # samples that one measurement uses; 16 of the demo's choose worse than `mse` throughout (measured)
TINY = 1e-30  # power of an output that is zero throughout

Ranges = Mapping[str, float]  # calibrator → amax
Choice = tuple[str, tuple[Candidate, ...]]  # the calibrator of least error, and what was measured for all


def split(calibration_set: CalibrationSet) -> tuple[CalibrationSet, CalibrationSet]:
    """Return the samples that make the candidate ranges, and those that judge them; the same ones if there are few.

    Who judges depends on the ids alone, not on their order.
    """
    order = calibration_set.scattered()
    if len(order) < ENOUGH:
        return calibration_set, calibration_set.take(order)
    judges = len(order) // 4
    return calibration_set.take(order[judges:]), calibration_set.take(order[:judges])


def choose(
    module: nn.Module, tensors: Mapping[str, Ranges], judges: CalibrationSet, input_names: Sequence[str]
) -> dict[str, Choice]:
    """Return for each quantizer the calibrator of least error.

    Args:
        module: from `build.build`; not changed.
        tensors: name of the quantizer in `module` → calibrator → its range. Of equal errors the first wins.
        judges: samples that measure.
        input_names: names of the arguments of `module`, in order.
    """
    distinct = {name: _distinct(ranges) for name, ranges in tensors.items()}
    trials = sum(len(candidates) for candidates in distinct.values() if len(candidates) > 1)
    count = max(LEAST, min(MOST, RUNS // max(trials, 1)))
    measure = _Measure(module, judges.take(range(min(count, len(judges)))), input_names)
    found = {}
    for name, candidates in distinct.items():
        tried = tuple(Candidate(names, amax, measure(name, amax)) for amax, names in candidates.items())
        best = max(tried, key=lambda each: each.db)  # the first of equals
        found[name] = best.calibrators[0], tried
    return found


def _distinct(ranges: Ranges) -> dict[float, tuple[str, ...]]:
    """Range → the calibrators that agree on it, in their order: equal candidates are tried once."""
    found: dict[float, tuple[str, ...]] = {}
    for name, amax in ranges.items():
        snapped = float(fp16_amax(torch.tensor(amax)))
        found[snapped] = (*found.get(snapped, ()), name)
    return found


@dataclass
class _Measure:
    """Signal over noise at the outputs when one tensor is quantised and everything else is float."""

    module: nn.Module
    samples: CalibrationSet
    input_names: Sequence[str]

    def __post_init__(self) -> None:
        with modelopt.bare(self.module):
            self.way = fastest_way(self.module, self.samples, self.input_names)
            self.wanted = list(run(self.module, self.samples, self.input_names, self.way))
        self.signal = np.array([_power(column) for column in zip(*self.wanted, strict=True)])

    def __call__(self, quantizer: str, amax: float) -> float:
        """dB; the relative noise power of several outputs is averaged, so that none is drowned by a larger one."""

        def rounded(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return torch.fake_quantize_per_tensor_affine(args[0], amax / STEPS, 0, -STEPS - 1, STEPS), *args[1:]

        owner = self.module.get_submodule(quantizer.rpartition(".")[0])
        handle = owner.register_forward_pre_hook(rounded)
        try:
            with modelopt.bare(self.module):
                found = list(run(self.module, self.samples, self.input_names, self.way))
        finally:
            handle.remove()
        noise = sum(np.array([_power([a - b]) for a, b in zip(got, wanted, strict=True)])
                    for got, wanted in zip(found, self.wanted, strict=True))
        return finite_db(power_db(1.0, float(np.mean(noise / np.maximum(self.signal, TINY)))))


def _power(tensors: Sequence[Tensor]) -> float:
    return float(sum(torch.sum(each.double() ** 2) for each in tensors))

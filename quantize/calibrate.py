"""Calibration: which samples showed the ranges, and the ranges they showed.

Samples come from the training split only. Each one is run alone, so that neither the batch size nor the order can
change a range: a convolution's last bit depends on the batch it runs in, a maximum over single samples does not.
"""

# N calibration samples, C channels

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmdeploy.data.format import Dataset
from fmdeploy.errors import ArtifactError, DataError
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.build import quantizer_name
from fmdeploy.quantize.placement import Placement
from fmdeploy.quantize.trace import as_tuple
from fmdeploy.task import Array, Arrays, Task

Extremes = tuple[float, float]
FORMAT = 1
SPLIT = "train"
# A tensor that never moves (behind a residual branch whose last BatchNorm starts at zero, say) still needs a scale. Any
# scale holds zero exactly; a very small one would overflow the 32-bit biases of the layer that reads it.
AMAX_OF_ZERO, TINY = 1.0, 1e-6


@dataclass(frozen=True)
class CalibrationSet:
    """Inputs by name, each (N, ...), in the order of their ids, and where they came from."""

    ids: tuple[str, ...]
    inputs: Arrays
    data: str
    seed: int

    @property
    def digest(self) -> str:
        """sha256 over ids and bytes of every input."""
        sha = hashlib.sha256("\n".join(self.ids).encode())
        for name in sorted(self.inputs):
            array = np.ascontiguousarray(self.inputs[name])
            sha.update(f"{name} {array.dtype} {array.shape}".encode())
            sha.update(array.tobytes())
        return sha.hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def tensors(self, names: Sequence[str], index: slice = slice(None)) -> tuple[Tensor, ...]:
        """Return the inputs `names` of the samples in `index` as tensors, in that order."""
        return tuple(torch.from_numpy(np.ascontiguousarray(self.inputs[name][index])) for name in names)


@dataclass(frozen=True)
class Range:
    """Smallest and largest value that one activation quantizer saw, and its `amax`."""

    low: float
    high: float
    amax: float


@dataclass(frozen=True)
class Calibration:
    """What `calibration.json` holds."""

    data: str
    digest: str
    seed: int
    samples: tuple[str, ...]
    ranges: dict[str, Range]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `constant` names the tensors that calibration saw one single value of."""
        constant = sorted(name for name, row in self.ranges.items() if row.low == row.high)
        return {"format": FORMAT, "method": "max", "split": SPLIT, "constant": constant, **asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Calibration:
        """Read back what `to_json` gave.

        Raises:
            ArtifactError: it is of another format.
        """
        try:
            ranges = {name: Range(**row) for name, row in values["ranges"].items()}
            return cls(values["data"], values["digest"], values["seed"], tuple(values["samples"]), ranges)
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"calibration.json lacks a field: {error}", fix="Re-run the quantize stage") from error


def draw(task: Task, data: Dataset, *, count: int, seed: int, split: str = SPLIT) -> CalibrationSet:
    """Choose `count` samples of the training split, the same for the same seed, and load their inputs.

    Raises:
        DataError: the split is another one, or it is empty, or the samples cannot calibrate anything.
    """
    if split != SPLIT:
        raise DataError("calibration samples must come from the training split: others are for judging",
                        expected=SPLIT, found=split)
    samples = task.samples(data, split)
    if len(samples) == 0 or count < 1:
        raise DataError("there are no calibration samples", where=data.artifact.root, found=min(count, len(samples)))
    chosen = np.random.default_rng(seed).permutation(len(samples))[:count]
    chosen = np.array(sorted(chosen, key=lambda k: samples.ids[k]))
    inputs, _ = samples.batch(chosen)
    calibration_set = CalibrationSet(tuple(samples.ids[k] for k in chosen), inputs, data.digest, seed)
    check_inputs(calibration_set)
    return calibration_set


def redraw(task: Task, data: Dataset, calibration: Calibration) -> CalibrationSet:
    """Load the very samples that a stored calibration was made with.

    Raises:
        DataError: the dataset does not hold them, or holds other values.
    """
    samples = task.samples(data, SPLIT)
    number = {name: k for k, name in enumerate(samples.ids)}
    missing = [name for name in calibration.samples if name not in number]
    if not missing:
        inputs, _ = samples.batch(np.array([number[name] for name in calibration.samples]))
        found = CalibrationSet(calibration.samples, inputs, data.digest, calibration.seed)
        if found.digest == calibration.digest:
            return found
    raise DataError("is not the dataset that the ranges were calibrated on", where=data.artifact.root,
                    expected=calibration.data[:12], found=data.digest[:12], fix="Quantise again with this dataset")


def check_inputs(calibration_set: CalibrationSet) -> None:
    """Refuse inputs that cannot calibrate: none at all, not finite, or one single value throughout.

    Raises:
        DataError: names the input.
    """
    if len(calibration_set) == 0:
        raise DataError("there are no calibration samples", expected="at least one", found=0)
    for name, array in calibration_set.inputs.items():
        if not np.isfinite(array).all():
            bad = next(i for i, sample in enumerate(array) if not np.isfinite(sample).all())
            raise DataError(f"calibration input {name!r} holds NaN or infinity", where=calibration_set.ids[bad])
        if array.size and float(array.min()) == float(array.max()):
            raise DataError(f"calibration input {name!r} is constant: it has no range", found=float(array.flat[0]))


def calibrate(
    module: nn.Module, placement: Placement, calibration_set: CalibrationSet, input_names: Sequence[str]
) -> Calibration:
    """Set every range of an uncalibrated quantised `module`, in place.

    Args:
        module: from `build.build`.
        placement: from there, too.
        calibration_set: its digest and ids go into the result.
        input_names: names of the arguments of `module`, in order.

    Raises:
        DataError: a tensor was never reached or is not finite, or an input or output holds one single value
            throughout. An inner tensor may: it gets a range that holds that value.
    """
    check_inputs(calibration_set)
    outputs: dict[int, Extremes] = {}
    rows = [row.quantizer for row in placement.activations]
    with _watch(module, placement) as seen:
        modelopt.calibrate(module, lambda model: _run_one_by_one(model, calibration_set, input_names, outputs))
    _refuse_constant_outputs(outputs)
    if never := [row for row in rows if row not in seen]:
        raise DataError("no calibration sample reached this tensor", where=never[0])
    amax = modelopt.ranges(module)
    ranges, changed = {}, dict(amax)
    for row in placement.activations:
        low, high = seen[row.quantizer]
        if not (np.isfinite(low) and np.isfinite(high)):
            raise DataError("calibration drove this tensor to NaN or infinity", where=row.tensors[0])
        name = quantizer_name(placement, row.quantizer)
        if low == high:
            changed[name] = torch.full_like(amax[name], max(abs(low), TINY) if low else AMAX_OF_ZERO)
        ranges[row.quantizer] = Range(low, high, float(changed[name]))
    if any(row.low == row.high for row in ranges.values()):
        modelopt.set_ranges(module, changed)
    return Calibration(calibration_set.data, calibration_set.digest, calibration_set.seed, calibration_set.ids, ranges)


def _run_one_by_one(
    model: nn.Module, calibration_set: CalibrationSet, input_names: Sequence[str], outputs: dict[int, Extremes]
) -> None:
    """Run every sample alone, and collect the smallest and largest value of each output in `outputs`."""
    with torch.no_grad():
        for k in range(len(calibration_set)):
            answer = as_tuple(model(*calibration_set.tensors(input_names, slice(k, k + 1))))
            for number, tensor in enumerate(answer):
                outputs[number] = _wider(outputs.get(number), tensor)


def _refuse_constant_outputs(outputs: dict[int, Extremes]) -> None:
    for number, (low, high) in outputs.items():
        if low == high:
            raise DataError("the student's output is constant over all calibration samples: it has learnt nothing",
                            where=f"output {number}", found=low)


def _wider(old: Extremes | None, tensor: Tensor) -> Extremes:
    low, high = (float(v) for v in torch.aminmax(tensor))
    old = old or (low, high)
    # NaN must stay: min() and max() would drop it or keep it depending on the order.
    return float(np.minimum(low, old[0])), float(np.maximum(high, old[1]))


@contextmanager
def _watch(module: nn.Module, placement: Placement) -> Iterator[dict[str, Extremes]]:
    """Collect the smallest and largest value that reaches each activation quantizer."""
    seen: dict[str, Extremes] = {}

    def hook(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = _wider(seen.get(name), args[0])

        return note

    handles = [
        module.get_submodule(quantizer_name(placement, row.quantizer)).register_forward_pre_hook(hook(row.quantizer))
        for row in placement.activations
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def input_statistics(inputs: Arrays) -> dict[str, Any]:
    """Describe what calibration saw of each input, for the guards of the runtime.

    Args:
        inputs: name → (N, C, ...) float32; an input of rank one (N, F) counts as one channel.

    Returns:
        name → per channel: `channel_mean`, `channel_std` (spread over samples of the sample's channel mean),
        `channel_min`, `channel_max`, `value_std` (over all values); and `min`, `max` of the whole input.
    """
    return {name: _statistics(array) for name, array in inputs.items()}


def _statistics(array: Array) -> dict[str, Any]:
    channels = array.shape[1] if array.ndim > 2 else 1
    values_NCS = array.reshape(len(array), channels, -1).astype(np.float64)
    means_NC = values_NCS.mean(axis=2)
    return {
        "channel_mean": means_NC.mean(axis=0).tolist(),
        "channel_std": means_NC.std(axis=0).tolist(),
        "channel_min": values_NCS.min(axis=(0, 2)).tolist(),
        "channel_max": values_NCS.max(axis=(0, 2)).tolist(),
        "value_std": values_NCS.std(axis=(0, 2)).tolist(),
        "min": float(array.min()),
        "max": float(array.max()),
        "samples": len(array),
    }

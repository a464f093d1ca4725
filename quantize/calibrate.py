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
from fmdeploy.task import Array, Arrays, Task

FORMAT = 1
SPLIT = "train"


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
        """Return plain JSON values."""
        return {"format": FORMAT, "method": "max", "split": SPLIT, **asdict(self)}

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
        DataError: a tensor was never reached, is not finite, or holds one single value throughout.
    """
    check_inputs(calibration_set)
    rows = [row.quantizer for row in placement.activations]
    with _watch(module, placement) as seen:
        modelopt.calibrate(module, lambda model: _run_one_by_one(model, calibration_set, input_names))
    if never := [row for row in rows if row not in seen]:
        raise DataError("no calibration sample reached this tensor", where=never[0])
    amax = modelopt.ranges(module)
    ranges = {}
    for row in placement.activations:
        low, high = seen[row.quantizer]
        if not (np.isfinite(low) and np.isfinite(high)):
            raise DataError("calibration drove this tensor to NaN or infinity", where=row.tensors[0])
        if low == high:
            raise DataError("this tensor is constant over all calibration samples: it has no range",
                            where=row.tensors[0], found=low)
        ranges[row.quantizer] = Range(low, high, float(amax[quantizer_name(placement, row.quantizer)]))
    return Calibration(calibration_set.data, calibration_set.digest, calibration_set.seed, calibration_set.ids, ranges)


def _run_one_by_one(model: nn.Module, calibration_set: CalibrationSet, input_names: Sequence[str]) -> None:
    with torch.no_grad():
        for k in range(len(calibration_set)):
            model(*calibration_set.tensors(input_names, slice(k, k + 1)))


@contextmanager
def _watch(module: nn.Module, placement: Placement) -> Iterator[dict[str, tuple[float, float]]]:
    """Collect the smallest and largest value that reaches each activation quantizer."""
    seen: dict[str, tuple[float, float]] = {}

    def hook(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            low, high = (float(v) for v in torch.aminmax(args[0]))
            old = seen.get(name, (low, high))
            # NaN must stay: min() and max() would drop it or keep it depending on the order.
            seen[name] = (float(np.minimum(low, old[0])), float(np.maximum(high, old[1])))

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

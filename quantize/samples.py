"""Calibration samples: which ones may show the ranges, and which ones are refused.

Samples come from the training split only, because the others are for judging. What cannot calibrate is refused by
name: nothing at all, NaN, one single value, values outside the range that the input's specification promises.
"""

# N calibration samples, C channels, S values of one channel

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fmdeploy.data.format import Dataset
from fmdeploy.errors import DataError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.progress import say
from fmdeploy.task import Array, Arrays, Samples, Task

if TYPE_CHECKING:
    from fmdeploy.quantize.ranges import Calibration

SPLIT = "train"
HELD_OUT = ("val", "test")
FEW = 16
CHUNK = 256  # samples that are read at once where a whole split is looked through


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
            sha.update(array.data)
        return sha.hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def scattered(self) -> list[int]:
        """Return all indices in an order that looks random and follows from the ids alone, not from their order."""
        return sorted(range(len(self)), key=lambda k: hashlib.sha256(self.ids[k].encode()).digest())

    def take(self, index: Sequence[int]) -> CalibrationSet:
        """Return the samples `index`, in that order."""
        inputs = {name: array[np.asarray(index, np.int64)] for name, array in self.inputs.items()}
        return CalibrationSet(tuple(self.ids[k] for k in index), inputs, self.data, self.seed)

    def tensors(self, names: Sequence[str], index: slice = slice(None)) -> tuple[Tensor, ...]:
        """Return the inputs `names` of the samples in `index` as tensors, in that order."""
        return tuple(torch.from_numpy(np.ascontiguousarray(self.inputs[name][index])) for name in names)


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
    return _load(samples, [samples.ids[k] for k in chosen], task.io, data, seed)


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


def _load(samples: Samples, ids: Sequence[str], io: IOSpec, data: Dataset, seed: int) -> CalibrationSet:
    number = {name: k for k, name in enumerate(samples.ids)}
    ordered = sorted(ids)
    inputs, _ = samples.batch(np.array([number[name] for name in ordered]))
    calibration_set = CalibrationSet(tuple(ordered), inputs, data.digest, seed)
    check_inputs(calibration_set, io)
    for text in remarks(calibration_set):
        say(f"calibration: {text}")
    return calibration_set


def remarks(calibration_set: CalibrationSet) -> tuple[str, ...]:
    """What is odd about the samples, with counts: too few, the same ones again, or without any content."""
    count, names = len(calibration_set), sorted(calibration_set.inputs)
    repeated = count - len(set(_fingerprints(calibration_set.inputs, names)))
    flat = {name: array.reshape(count, -1) for name, array in calibration_set.inputs.items()}
    empty = {name: int((rows == rows[:, :1]).all(axis=1).sum()) for name, rows in flat.items()}
    found = [f"{number} of {count} samples of {name} are constant" for name, number in empty.items() if number]
    if repeated:
        found.append(f"{repeated} of {count} samples repeat another one")
    if count < FEW:
        found.append(f"only {count} samples; ranges from fewer than {FEW} depend on which they are")
    return tuple(found)


def check_inputs(calibration_set: CalibrationSet, io: IOSpec | None = None) -> None:
    """Refuse inputs that cannot calibrate: none at all, not finite, one single value, or not what `io` says.

    Raises:
        DataError: names the input, and the sample where one is to blame.
    """
    if len(calibration_set) == 0:
        raise DataError("there are no calibration samples", expected="at least one", found=0)
    if io is not None:
        for spec in io.inputs:
            _check_specification(calibration_set, spec, io.preprocessing)
    for name, array in calibration_set.inputs.items():
        if len(array) != len(calibration_set):
            raise DataError(f"calibration input {name!r} has another number of samples than there are ids",
                            expected=len(calibration_set), found=len(array))
        if not np.isfinite(array).all():
            bad = next(i for i, sample in enumerate(array) if not np.isfinite(sample).all())
            raise DataError(f"calibration input {name!r} holds NaN or infinity", where=calibration_set.ids[bad])
        if array.size and float(array.min()) == float(array.max()):
            raise DataError(f"calibration input {name!r} is constant: it has no range", found=float(array.flat[0]))


def _check_specification(calibration_set: CalibrationSet, spec: TensorSpec, preprocessing: str) -> None:
    array = calibration_set.inputs.get(spec.name)
    if array is None:
        raise DataError(f"calibration input {spec.name!r} is missing", found=sorted(calibration_set.inputs))
    if tuple(array.shape[1:]) != spec.shape or array.dtype != np.dtype(spec.dtype):
        raise DataError(f"calibration input {spec.name!r} is of another shape or type",
                        expected=f"{spec.dtype} {spec.shape}", found=f"{array.dtype} {tuple(array.shape[1:])}")
    if spec.value_range is None:
        return
    low, high = spec.value_range
    outside = (array < low) | (array > high)  # NaN is neither: it gets its own words
    if outside.any():
        bad = int(np.argmax(outside.reshape(len(array), -1).any(axis=1)))
        worst = array[bad][outside[bad]].flat[0]
        raise DataError(f"calibration input {spec.name!r} leaves its range", where=calibration_set.ids[bad],
                        expected=f"{low:g} to {high:g}", found=f"{float(worst):g}",
                        fix=f"Preprocess once, as the specification says: {preprocessing}")


def refuse_overlap(calibration_set: CalibrationSet, task: Task, data: Dataset) -> None:
    """Refuse your own arrays where they hold a sample that the held-out splits have and the training split has not.

    Samples are compared by id and by the bytes of their inputs.

    Raises:
        DataError: names the calibration sample and the split.
    """
    training = task.samples(data, SPLIT)
    names = [spec.name for spec in task.io.inputs]
    own = dict(zip(_fingerprints(calibration_set.inputs, names), calibration_set.ids, strict=True))
    for split in HELD_OUT:
        if not data.splits.get(split):
            continue
        held = task.samples(data, split)
        if same := sorted(set(calibration_set.ids) & set(held.ids) - set(training.ids)):
            raise DataError("calibration sample overlaps evaluation", where=same[0], expected=SPLIT, found=split)
        if shared := _all_fingerprints(held, names) & set(own):
            shared -= _all_fingerprints(training, names)
        if shared:
            raise DataError("calibration sample holds the values of a held-out one", where=min(own[k] for k in shared),
                            expected=SPLIT, found=split)


def _all_fingerprints(samples: Samples, names: Sequence[str]) -> set[bytes]:
    found: set[bytes] = set()
    for start in range(0, len(samples), CHUNK):
        inputs, _ = samples.batch(np.arange(start, min(start + CHUNK, len(samples))))
        found |= set(_fingerprints(inputs, names))
    return found


def _fingerprints(inputs: Arrays, names: Sequence[str]) -> list[bytes]:
    count = len(inputs[names[0]])
    return [hashlib.sha256(b"".join(np.ascontiguousarray(inputs[n][k]).tobytes() for n in names)).digest()
            for k in range(count)]


def input_statistics(inputs: Arrays) -> dict[str, Any]:
    """Describe what calibration saw of each input, for the guards of the runtime.

    Args:
        inputs: name → (N, C, ...) float32; an input of rank one (N, F) counts as one channel.

    Returns:
        name → per channel: `channel_mean`, `channel_std` (spread over samples of the sample's channel mean),
        `energy_mean`, `energy_std` (the same of the squares),
        `channel_min`, `channel_max`, `value_std` (over all values); and `min`, `max` of the whole input.
    """
    return {name: _statistics(array) for name, array in inputs.items()}


def output_statistics(outputs: Arrays) -> dict[str, Any]:
    """Describe what calibration samples gave at each output, name → (N, ...): root mean squares of the samples."""
    found = {}
    for name, array in outputs.items():
        rms_N = np.sqrt(np.square(array.reshape(len(array), -1).astype(np.float64)).mean(axis=1))
        found[name] = {"rms_mean": float(rms_N.mean()), "rms_std": float(rms_N.std()), "rms_min": float(rms_N.min()),
                       "rms_max": float(rms_N.max())}
    return found


def _statistics(array: Array) -> dict[str, Any]:
    channels = array.shape[1] if array.ndim > 2 else 1
    values_NCS = array.reshape(len(array), channels, -1).astype(np.float64)
    means_NC, energies_NC = values_NCS.mean(axis=2), np.square(values_NCS).mean(axis=2)
    return {
        "channel_mean": means_NC.mean(axis=0).tolist(),
        "channel_std": means_NC.std(axis=0).tolist(),
        "energy_mean": energies_NC.mean(axis=0).tolist(),
        "energy_std": energies_NC.std(axis=0).tolist(),
        "channel_min": values_NCS.min(axis=(0, 2)).tolist(),
        "channel_max": values_NCS.max(axis=(0, 2)).tolist(),
        "value_std": values_NCS.std(axis=(0, 2)).tolist(),
        "min": float(array.min()),
        "max": float(array.max()),
        "samples": len(array),
    }

"""Running the calibration samples through the float model, and what is noted on the way.

Smallest and largest value of a tensor are those of all its values; the histogram counts an even spread of them.
Nothing depends on the order of the samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fmdeploy.errors import DataError
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.build import quantizer_name
from fmdeploy.quantize.histogram import Histogram
from fmdeploy.quantize.placement import Placement
from fmdeploy.quantize.samples import CalibrationSet
from fmdeploy.quantize.trace import as_tuple

Extremes = tuple[float, float]
BATCH = 8  # a third faster than one by one, and small enough for the caches (measured); channels-last saves a tenth
VALUES = 1 << 12  # of one tensor and sample that are counted: a million a tensor for the usual 256 samples
SAME = 1e-3  # largest difference, relative to the largest output, between a sample alone and in a batch


@dataclass(frozen=True)
class Observation:
    """What some samples showed of a model.

    Attributes:
        tensors: Activation quantizer → histogram of what reaches it.
        outputs: Smallest and largest value of each output.
    """

    tensors: dict[str, Histogram]
    outputs: tuple[Extremes, ...]

    def merge(self, other: Observation) -> Observation:
        """Return what the samples of both showed."""
        tensors = {name: each.merge(other.tensors[name]) for name, each in self.tensors.items()}
        pairs = zip(self.outputs, other.outputs, strict=True)
        return Observation(tensors, tuple((min(a[0], b[0]), max(a[1], b[1])) for a, b in pairs))

    @property
    def digest(self) -> str:
        """sha256 over the states of all histograms."""
        states = [f"{name} {histogram.digest}" for name, histogram in sorted(self.tensors.items())]
        return hashlib.sha256("\n".join(states).encode()).hexdigest()


def observe(
    module: nn.Module, placement: Placement, calibration_set: CalibrationSet, input_names: Sequence[str]
) -> Observation:
    """Run the samples through the float model, and count what reaches every activation quantizer.

    Raises:
        DataError: a tensor was never reached or is not finite.
    """
    found = {row.quantizer: Histogram() for row in placement.activations}
    outputs: list[Histogram] = []
    with modelopt.bare(module):
        way = fastest_way(module, calibration_set, input_names)
        with _watch(module, placement, found):
            for answer in run(module, calibration_set, input_names, way):
                outputs = outputs or [Histogram() for _ in answer]
                for number, tensor in enumerate(answer):
                    outputs[number].see(tensor, where=f"output {number}")
    if never := [row.tensors[0] for row in placement.activations if not found[row.quantizer].total]:
        raise DataError("no calibration sample reached this tensor", where=never[0])
    return Observation(found, tuple((each.low, each.high) for each in outputs))


@dataclass(frozen=True)
class Way:
    """How samples are run: how many share a batch, and whether images lie channels-last in memory."""

    batch: int = 1
    channels_last: bool = False


def fastest_way(model: nn.Module, calibration_set: CalibrationSet, input_names: Sequence[str]) -> Way:
    """The fastest way in which two samples in one batch give what each gives alone.

    A network that was traced with one sample may know its batch size by heart, one that calls `view` may refuse
    channels-last. One that could not be traced may branch on its values: two samples cannot show what a batch of
    others takes it to, so that it sees one sample at a time.
    """
    if not isinstance(model, fx.GraphModule):
        return Way()
    pair = calibration_set.take(calibration_set.scattered()[:2])
    alone = [torch.cat(rows) for rows in zip(*run(model, pair, input_names, Way()), strict=True)]
    for channels_last in (True, False):
        try:
            together = next(run(model, pair, input_names, Way(len(pair), channels_last)))
        except Exception:  # whatever a foreign network raises
            continue
        pairs = list(zip(together, alone, strict=True))
        if all(a.shape == b.shape and bool((a - b).abs().max() <= SAME * b.abs().max()) for a, b in pairs):
            return Way(BATCH, channels_last)
    return Way()


def run(
    model: nn.Module, calibration_set: CalibrationSet, input_names: Sequence[str], way: Way
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the outputs of the samples, one batch at a time.

    A convolution's last bit depends on the batch it runs in, so who shares a batch must not depend on the order in
    which the samples come: batches are cut from the order that their ids give.
    """
    order = calibration_set.scattered()
    for start in range(0, len(order), way.batch):
        inputs = calibration_set.take(order[start : start + way.batch]).tensors(input_names)
        if way.channels_last:
            inputs = tuple(x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs)
        with torch.inference_mode():  # not around the yield: it would hold for the reader, or be left out of order
            outputs = as_tuple(model(*inputs))
        yield outputs


def flat(values: Tensor) -> Tensor:
    """Return the values of each sample (B, V) in the order in which they lie in memory; a view where that can be."""
    values = values.detach()
    if values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
    return values.flatten(1) if values.ndim > 1 else values[:, None]


def spread(flat_BV: Tensor) -> Tensor:
    """Return at most `VALUES` values of each sample, at positions that follow from their number: (B, <= VALUES).

    The step has no divisor in common with the number of values, so that no channel or column is left out.
    """
    step = -(-flat_BV.shape[1] // VALUES)
    while math.gcd(step, flat_BV.shape[1]) > 1:
        step += 1
    return flat_BV[:, ::step]


@contextmanager
def _watch(module: nn.Module, placement: Placement, found: dict[str, Histogram]) -> Iterator[None]:
    """Note what reaches each activation quantizer."""

    def hook(name: str, tensor: str) -> Any:
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            flat_BV = flat(args[0])
            found[name].see(flat_BV, where=tensor)
            found[name].count(spread(flat_BV))

        return note

    # The owner of a quantizer sees the same tensor, and is called where the quantizer is not.
    owners = [quantizer_name(placement, row.quantizer).rpartition(".")[0] for row in placement.activations]
    handles = [module.get_submodule(owner).register_forward_pre_hook(hook(row.quantizer, row.tensors[0]))
               for owner, row in zip(owners, placement.activations, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

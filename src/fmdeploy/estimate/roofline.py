"""How long kernels take: a roofline (doi:10.1145/1498765.1498785) with efficiencies and a cost for every launch.

    t = max(2 · MAC · B / (e_c · peak), bytes / (e_b · bandwidth)) + t0
    bytes = weights · p + B · Σ (reads + writes) · p       p: bytes of an element in the kernel's precision

(`Device.overlap` lets a CPU, which hides less, add a part of the smaller term.)
Kernels run one after the other, so a network's time is their sum. e_c (one a precision), e_b and t0 are fitted on
published latencies (`fit.py`); t0 scales with the clock, since it is mostly the filling and draining of the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log2

from fmdeploy.estimate.devices import Device
from fmdeploy.estimate.work import COMPUTE, Precision, Work

TRANSFORMER_KINDS = ("attention", "matmul", "norm", "softmax")
TRANSFORMER_SHARE = 0.1  # of the bytes moved by such kernels makes a network "transformer-like"
WIDENING = 0.15  # of the band's half-width, for every factor of two outside the fitted sizes


@dataclass(frozen=True)
class Layer:
    """One kernel of a prediction.

    Attributes:
        ms: its time.
        bound: "compute", "memory" or "launch": what most of the time is.
    """

    work: Work
    precision: Precision
    ms: float
    bound: str


@dataclass(frozen=True)
class Prediction:
    """Predicted latency of one call; `low_ms` to `high_ms` held 9 of 10 networks that the fit had not seen."""

    p50_ms: float
    low_ms: float
    high_ms: float
    layers: tuple[Layer, ...]
    like: str  # "convolution" or "transformer": which spread the band has
    widened: float  # factor on the band's half-width; 1 inside the fitted sizes


def seconds(work: Work, device: Device, precision: Precision, batch: int = 1) -> float:
    """Time of one kernel.

    Args:
        work: what it does for one sample.
        device: where, in one power mode.
        precision: what the engine was asked for; `Work.precision` says what this kernel runs in.
        batch: samples a call.
    """
    return sum(_terms(work, device, precision, batch)[:2])


def predict(rows: Sequence[Work], device: Device, precision: Precision, batch: int = 1) -> Prediction:
    """Latency of a network with its band."""
    layers = tuple(_layer(row, device, precision, batch) for row in rows)
    total = sum(layer.ms for layer in layers)
    like = "transformer" if is_transformer(rows, device, precision, batch) else "convolution"
    widened = _widening(sum(row.macs for row in rows) * batch, device)
    width = widened * getattr(device.constants.spread, like)
    return Prediction(total, total * exp(-width), total * exp(width), layers, like, widened)


def is_transformer(rows: Sequence[Work], device: Device, precision: Precision, batch: int = 1) -> bool:
    """Whether the band of transformers applies; judged by bytes, so that it needs no fitted constants."""
    moved = [(row.kind, row.bytes_moved(precision, batch, device.rest)) for row in rows]
    return sum(size for kind, size in moved if kind in TRANSFORMER_KINDS) > TRANSFORMER_SHARE * sum(s for _, s in moved)


def _layer(work: Work, device: Device, precision: Precision, batch: int) -> Layer:
    body, launch, bound = _terms(work, device, precision, batch)
    return Layer(work, work.precision(precision, device.rest), (body + launch) * 1e3,
                 "launch" if launch > body else bound)


def _terms(work: Work, device: Device, precision: Precision, batch: int) -> tuple[float, float, str]:
    """Seconds of the body and of the launch, and what bounds the body."""
    kind = work.precision(precision, device.rest)
    constants = device.constants
    compute = 0.0
    if work.kind in COMPUTE:
        compute = 2 * work.macs * batch / (getattr(constants.compute, kind) * device.peak[kind])
    memory = work.bytes_moved(precision, batch, device.rest) / (constants.memory * device.bandwidth)
    if work.kind in device.rates:
        memory = batch * (work.reads + work.writes) / device.rates[work.kind]
    body = max(compute, memory) + (1 - device.overlap) * min(compute, memory)
    return body, device.launch, "compute" if compute > memory else "memory"


def _widening(macs: int, device: Device) -> float:
    seen, gmac = device.constants.seen_gmac, max(macs, 1) / 1e9
    outside = max(seen.low / gmac, gmac / seen.high, 1.0)
    return 1 + WIDENING * log2(outside)

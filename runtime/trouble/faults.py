"""Faults of sensors and transport, as functions of a stream: what the runtime receives in place of the clean frame.

Legend: k position in a sequence; faults begin with position `ONSET`, so that every stream was healthy once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.task import Task

ONSET = 3
FROZEN, LATE, DROPOUT = "frozen", "late", "dropout"
Generator = np.random.Generator
Corrupt = Callable[[Arrays, Generator], Arrays]


class Delivered(NamedTuple):
    """One delivery to the runtime.

    Attributes:
        inputs: Arrays of the sensors that are there; they belong to the receiver.
        missing: Inputs whose sensor is declared missing.
        source: Position in the sequence whose content (and stamp) this is.
        restamped: The stamp claims to be of now, whatever the content.
    """

    inputs: Arrays
    missing: tuple[str, ...] = ()
    source: int = 0
    restamped: bool = False


Clean = Callable[[int], Arrays]
Deliver = Callable[[int, Clean, Generator], Delivered]


@dataclass(frozen=True)
class Fault:
    """One fault at one level.

    Attributes:
        name: Kind of fault, such as `noise`; levels of one kind share it.
        level: What is done, with its unit.
        deliver: Position, clean frames by position, random numbers → what arrives.
    """

    name: str
    level: str
    deliver: Deliver

    @property
    def key(self) -> str:
        """A name for files."""
        return f"{self.name} {self.level}".strip()


def clean() -> Fault:
    """Nothing is wrong: the control."""
    return Fault("clean", "", lambda k, frame, _: Delivered(frame(k), source=k))


def faults_of(task: Task) -> list[Fault]:
    """The control and every fault, in the order of the report."""
    io = task.io
    return [clean(), *_dropouts(io), *_noises(io), *_own(task), *_frozen(io), *(_late(n) for n in (1, 2)), _nan(io)]


def corrupted(name: str, level: str, corrupt: Corrupt) -> Fault:
    """A fault that alters each frame by itself."""
    return Fault(name, level, lambda k, frame, rng: Delivered(corrupt(frame(k), rng), source=k))


def _dropouts(io: IOSpec) -> Iterator[Fault]:
    """One sensor at a time is gone, and says so."""
    for spec in io.inputs if len(io.inputs) > 1 else ():
        yield Fault(DROPOUT, spec.name, functools.partial(_without, spec.name))


def _without(name: str, k: int, frame: Clean, rng: Generator) -> Delivered:
    return Delivered({key: value for key, value in frame(k).items() if key != name}, (name,), k)


def _noises(io: IOSpec) -> Iterator[Fault]:
    """Gaussian noise, clipped to the value range, and cells that flip to an end of it."""
    for sigma in (0.05, 0.2):
        yield corrupted("noise", f"σ {sigma:g} of the range", functools.partial(_each, io, _gaussian, sigma))
    for share in (0.02, 0.1):
        yield corrupted("salt and pepper", f"{share:.0%} of the cells", functools.partial(_each, io, _salted, share))


def _own(task: Task) -> Iterator[Fault]:
    """Faults that only the task can make from its inputs, such as fog."""
    for name, levels in task.corruptions().items():
        for level, corrupt in levels.items():
            yield corrupted(name, level, corrupt)


def _frozen(io: IOSpec) -> Iterator[Fault]:
    """A sensor, or all of them, repeats the last frame before the fault; the stamps go on."""
    groups: list[tuple[str, ...]] = [(spec.name,) for spec in io.inputs]
    for names in [*groups, tuple(spec.name for spec in io.inputs)] if len(groups) > 1 else groups:
        level = names[0] if len(names) == 1 else "all sensors"
        yield Fault(FROZEN, level, functools.partial(_stuck, names))


def _stuck(names: Sequence[str], k: int, frame: Clean, rng: Generator) -> Delivered:
    now = frame(k)
    held = frame(min(k, ONSET - 1))
    return Delivered({name: held[name] if name in names else value for name, value in now.items()}, source=k,
                     restamped=True)


def _late(behind: int) -> Fault:
    """Frames arrive so many frames after they were taken, with their true stamps."""
    level = f"{behind} frame{'s' if behind > 1 else ''}"
    return Fault(LATE, level, lambda k, frame, _: Delivered(frame(k - behind), source=k - behind))


def _nan(io: IOSpec) -> Fault:
    """A hundredth of all values is NaN: what INT8 turns into plausible numbers."""
    return corrupted("NaN", "1% of the values", functools.partial(_each, io, _with_nan, 0.01))


Change = Callable[[TensorSpec, Array, Generator, float], Array]


def _each(io: IOSpec, change: Change, amount: float, inputs: Arrays, rng: Generator) -> Arrays:
    return {spec.name: change(spec, inputs[spec.name], rng, amount) for spec in io.inputs}


def _gaussian(spec: TensorSpec, value: Array, rng: Generator, sigma: float) -> Array:
    low, high = _range(spec, value)
    noise = rng.standard_normal(value.shape, np.float32) * np.float32(sigma * (high - low))
    return np.clip(value + noise, low, high).astype(value.dtype)


def _salted(spec: TensorSpec, value: Array, rng: Generator, share: float) -> Array:
    low, high = _range(spec, value)
    hit = rng.random(value.shape, np.float32) < share
    return np.where(hit, np.where(rng.random(value.shape, np.float32) < 0.5, low, high), value).astype(value.dtype)


def _with_nan(spec: TensorSpec, value: Array, rng: Generator, share: float) -> Array:
    if value.dtype.kind != "f":
        return value
    return np.where(rng.random(value.shape, np.float32) < share, np.float32(np.nan), value).astype(value.dtype)


def _range(spec: TensorSpec, value: Array) -> tuple[float, float]:
    return spec.value_range or (float(value.min()), float(value.max()))

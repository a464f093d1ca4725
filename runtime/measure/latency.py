"""Latency, fairly: tiers take turns frame by frame, so that a busy machine slows all of them alike."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fmdeploy.arrays import Array, Arrays
from fmdeploy.runtime.bundle import Bundle
from fmdeploy.runtime.session import Runtime

Times = Sequence[float] | npt.NDArray[np.float64]
WARM_UP = 20
NS_PER_MS = 1e6
MIN_RUNS_FOR_P99 = 100


@dataclass(frozen=True)
class Speedup:
    """How many times faster a tier is than another, paired frame by frame, with a 95 % interval of the median."""

    value: float
    low: float
    high: float
    runs: int


def golden_frames(bundle: Bundle) -> list[Arrays]:
    """Return the golden inputs as frames that own their memory, as a sensor would deliver them."""
    return [{name: array.copy() for name, array in bundle.golden.sample(n).items()} for n in range(len(bundle.golden))]


def measure_latency(runtimes: Mapping[str, Runtime], frames: Sequence[Arrays], runs: int) -> dict[str, list[float]]:
    """Return the latency of `Runtime.infer`, in ms, of each runtime: `runs` rounds in which all take one frame each."""
    calls = {name: _infer_call(runtime, frames) for name, runtime in runtimes.items()}
    return interleave(calls, runs)


def interleave(calls: Mapping[str, Callable[[int], object]], runs: int) -> dict[str, list[float]]:
    """Time every call once a round, in ms. The order turns each round: a call leaves its mark on the caches."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-WARM_UP, runs):
        shift = number % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter_ns()
            calls[name](number)
            elapsed = (time.perf_counter_ns() - start) / NS_PER_MS
            if number >= 0:
                times[name].append(elapsed)
    return times


def summary(times_ms: Sequence[float]) -> dict[str, Any]:
    """Return n, p50, p95, p99 and max; a percentile that the number of runs cannot support is None."""
    if not times_ms:
        return {"n": 0, "p50_ms": None, "p95_ms": None, "p99_ms": None, "max_ms": None}
    p50, p95, p99 = (float(value) for value in np.percentile(times_ms, [50, 95, 99]))
    enough = len(times_ms) >= MIN_RUNS_FOR_P99
    return {"n": len(times_ms), "p50_ms": p50, "p95_ms": p95, "p99_ms": p99 if enough else None,
            "max_ms": float(max(times_ms))}


def speedup(slow_ms: Times, fast_ms: Times) -> Speedup:
    """Return the median of the paired ratios slow/fast.

    The interval is the order statistics n/2 ± 0.98 sqrt(n): distribution-free, Conover 1999, section 3.2.
    """
    ratios = np.sort(np.asarray(slow_ms) / np.asarray(fast_ms))
    runs = len(ratios)
    if runs == 0:
        return Speedup(math.nan, math.nan, math.nan, 0)
    reach = 0.98 * math.sqrt(runs)
    low, high = max(int(runs / 2 - reach), 0), min(math.ceil(runs / 2 + reach), runs - 1)
    return Speedup(float(np.median(ratios)), float(ratios[low]), float(ratios[high]), runs)


def measure_overhead(
    runtime: Runtime, frames: Sequence[Arrays], runs: int, *, fresh: bool = True
) -> dict[str, Any]:
    """Return the cost of `Runtime.infer` over the bare session, in microseconds, with an A/A control.

    A round is infer and twice the bare session, in an order that runs through all six: a call that follows another
    finds its caches and its memory, and so no side always follows the same one. The overhead is the median (and the
    99th percentile) of infer minus the mean of the round's two bare runs, the control that of one bare run minus the
    other: what the machine does to any difference of two runs.

    Args:
        runtime: What is measured.
        frames: Frames to take in turn.
        runs: Rounds.
        fresh: Every call finds its frame just written, as preprocessing on this core leaves it; otherwise the frames
            lie in memory and whoever reads them first waits for it.
    """
    run = runtime.backend.run
    slots = [{name: array.copy() for name, array in frame.items()} for frame in frames[: 1 if fresh else None]]
    feeds = [{name: array[None] for name, array in slot.items()} for slot in slots]

    def bare(number: int) -> object:
        return run(feeds[number % len(feeds)])

    def infer(number: int) -> object:
        return runtime.infer(slots[number % len(slots)])

    orders = list(itertools.permutations(range(3)))
    sides = bare, infer, bare
    rows = np.empty((runs, 3))
    for number in range(-WARM_UP, runs):
        for side in orders[number % len(orders)]:
            if fresh:
                for name, array in frames[number % len(frames)].items():
                    np.copyto(slots[0][name], array)
            start = time.perf_counter_ns()
            sides[side](number)
            elapsed = time.perf_counter_ns() - start
            if number >= 0:
                rows[number, side] = elapsed / 1e3
    return _overhead(rows)


def _overhead(rows: Array) -> dict[str, Any]:
    """Medians over rounds (runs, 3) of bare, infer, bare in microseconds."""
    one, guarded, other = rows.T
    bare_us = (one + other) / 2
    difference, control = guarded - bare_us, other - one
    enough = len(rows) >= MIN_RUNS_FOR_P99
    return {
        "runs": len(rows),
        "bare_us": float(np.median(bare_us)),
        "infer_us": float(np.median(guarded)),
        "overhead_us": float(np.median(difference)),
        "overhead_p99_us": float(np.percentile(difference, 99)) if enough else None,
        "ratio": float(np.median(guarded / bare_us)),
        "control_us": float(np.median(control)),
        "control_p99_us": float(np.percentile(control, 99)) if enough else None,
    }


def _infer_call(runtime: Runtime, frames: Sequence[Arrays]) -> Callable[[int], object]:
    def call(number: int) -> object:
        return runtime.infer(frames[number % len(frames)])

    return call

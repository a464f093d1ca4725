"""What a loaded model shows on this machine before it may serve: golden vectors, repeatability, latency, memory.

The golden samples are run once each, and as often again as it takes to have enough times; the repeats must give the
same answer. So the measurements cost a handful of runs beyond the self-test itself.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.budgets import TargetBudget
from fmdeploy.errors import ModelFileError
from fmdeploy.evaluate.sqnr import sqnr_db
from fmdeploy.jetson.memory import table_of
from fmdeploy.jetson.reading import read_text
from fmdeploy.runtime.backends.protocol import Backend
from fmdeploy.runtime.bundle import Bundle

WARM_UP_RUNS = 3
MIN_RUNS = 12
NS_PER_MS = 1e6
NO_TARGET = ""


@dataclass(frozen=True)
class Shown:
    """What a trial found.

    Attributes:
        worst_db: Smallest SQNR over golden samples and outputs; NaN counts as -inf.
        times_ms: Duration of every timed run, without guards.
        unrepeatable: Which output differed between two runs of one input, and how; empty where none did.
    """

    worst_db: float
    times_ms: tuple[float, ...]
    unrepeatable: str = ""

    @property
    def p50_ms(self) -> float:
        """Median of the times."""
        # np.median would import numpy.ma, which costs more than the whole trial.
        ordered = sorted(self.times_ms)
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

    @property
    def best_ms(self) -> float:
        """The fastest run: what the machine can do when nobody else wants it."""
        return min(self.times_ms)


def golden_feeds(bundle: Bundle, number: int) -> Arrays:
    """One golden sample as a batch of one."""
    return {name: np.ascontiguousarray(array[None]) for name, array in bundle.golden.sample(number).items()}


def golden_sqnr_db(bundle: Bundle, variant: str, backend: Backend, numbers: Iterable[int] | None = None) -> float:
    """Run golden samples, all by default, and return the smallest SQNR over samples and outputs, in dB."""
    chosen = range(len(bundle.golden)) if numbers is None else numbers
    return min((_sample_db(bundle, variant, k, backend.run(golden_feeds(bundle, k))) for k in chosen), default=math.inf)


def trial(bundle: Bundle, variant: str, backend: Backend, *, repeat_db: float = math.inf) -> Shown:
    """Warm a backend up, run the golden samples, and time and repeat them.

    Args:
        bundle: Holds the samples and the answers to them.
        variant: Whose answers are expected.
        backend: What is tried.
        repeat_db: How close two runs of one input must be; infinite: equal in every bit.
    """
    feeds = [golden_feeds(bundle, number) for number in range(len(bundle.golden))]
    first: dict[int, Sequence[Array]] = {}
    for _ in range(WARM_UP_RUNS):  # the first run allocates and is many times slower
        first.setdefault(0, backend.run(feeds[0]))
    worst, unrepeatable, times = math.inf, "", []
    for number in range(max(len(feeds), MIN_RUNS)):
        sample = number % len(feeds)
        start = time.perf_counter_ns()
        answer = backend.run(feeds[sample])
        times.append((time.perf_counter_ns() - start) / NS_PER_MS)
        if number < len(feeds):
            worst = min(worst, _sample_db(bundle, variant, sample, answer))
        unrepeatable = unrepeatable or _difference(bundle, first.setdefault(sample, answer), answer, repeat_db)
    return Shown(worst, tuple(times), unrepeatable)


def more_times(bundle: Bundle, backend: Backend, shown: Shown) -> Shown:
    """The same with as many timed runs again: a machine that was busy a moment ago gets a second chance."""
    feeds = [golden_feeds(bundle, number) for number in range(len(bundle.golden))]
    times = []
    for number in range(len(shown.times_ms)):
        start = time.perf_counter_ns()
        backend.run(feeds[number % len(feeds)])
        times.append((time.perf_counter_ns() - start) / NS_PER_MS)
    return Shown(shown.worst_db, (*shown.times_ms, *times), shown.unrepeatable)


def budget_here(bundle: Bundle, target: str | None) -> TargetBudget | None:
    """The budget that a tier is held against.

    Args:
        bundle: Its budgets.
        target: Name of a target of the budgets. None: the one target that names this kind of machine, if there is one;
            a budget for no machine in particular holds only where it is asked for. "": none.

    Raises:
        ConfigError: there is no target of that name.
    """
    if target == NO_TARGET:
        return None
    machine = platform.machine()
    if target is None:
        fitting = [budget for budget in bundle.budgets.target.values() if budget.machine == machine]
        return fitting[0] if len(fitting) == 1 else None
    budget = bundle.budgets.for_target(target)[1]
    return budget if budget.machine in (None, machine) else None


@dataclass(frozen=True)
class MemoryMark:
    """Memory of this process at one moment, in MiB: resident, its peak so far, and the GPU's share on a Jetson."""

    rss: float
    peak: float
    gpu: float

    @classmethod
    def now(cls, root: Path = Path("/")) -> MemoryMark | None:
        """Read it; None where the kernel does not say."""
        status = table_of(read_text(root / "proc/self/status") or "")
        if "VmRSS" not in status or "VmHWM" not in status:
            return None
        machine = table_of(read_text(root / "proc/meminfo") or "")
        return cls(status["VmRSS"], status["VmHWM"], machine.get("NvMapMemUsed", 0.0))


def peak_growth_mib(before: MemoryMark | None, after: MemoryMark | None) -> float | None:
    """What came on top at the worst moment between two marks, in MiB; None where the kernel does not say.

    The peak counts, not what is resident now: an arena that shrank would take it again. A peak from before hides a
    smaller one; then what is resident now is the least that can be said.
    """
    if before is None or after is None:
        return None
    highest = after.peak if after.peak > before.peak else after.rss
    return max(0.0, highest - before.rss) + max(0.0, after.gpu - before.gpu)


def _sample_db(bundle: Bundle, variant: str, number: int, answer: Sequence[Array]) -> float:
    expected = bundle.golden.outputs[variant]
    return min(sqnr_db(expected[spec.name][number][None], found)
               for spec, found in zip(bundle.io.outputs, answer, strict=True))


def _difference(bundle: Bundle, one: Sequence[Array], two: Sequence[Array], repeat_db: float) -> str:
    for spec, first, second in zip(bundle.io.outputs, one, two, strict=True):
        if np.array_equal(first, second):
            continue
        ratio = sqnr_db(first, second)
        if not ratio >= repeat_db:
            wanted = "equal bits" if math.isinf(repeat_db) else f"at least {repeat_db:.0f} dB"
            return f"two runs of one input differ in {spec.name!r}: {ratio:.1f} dB, {wanted} needed"
    return ""


def require_answers(bundle: Bundle, variant: str) -> float:
    """How close a variant's outputs must be to the golden ones, in dB.

    Raises:
        ModelFileError: the bundle holds no such model, or no golden answers to it.
    """
    if variant not in bundle.variants:
        raise ModelFileError(f"the bundle has no model.{variant}.onnx")
    if (tolerance := bundle.golden.index.variants.get(variant)) is None:
        raise ModelFileError("the bundle has no golden vectors for it")
    return tolerance.sqnr_db

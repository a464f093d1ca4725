"""What `Runtime.infer` costs over the bare session, with all guards on, and what each guard costs.

    python benchmarks/runtime_overhead.py [--bundle DIR] [--runs N]

Rounds of bare, infer, bare in one process, in all orders in turn; `control` is bare against bare (A/A), and its p99 is
what this machine does to the difference of any two runs. Without `--bundle` it uses a small convolutional model with
the demo task's inputs: lidar (8, 64, 64) and camera (12, 64, 64), 328 kB of float32.
Every frame was just written by this core, as preprocessing leaves it; the line "cold" is for frames that lie in memory
and are read first by the guards. Targets: overhead at most 30 µs at the median and 100 µs at p99.
The guard lines come from one frame after the other: fresh inputs, the guards, the model, the guards of the outputs,
each step between two readings of the clock. A step that follows the model pays for code and data that the model pushed
out of the caches.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fmdeploy.arrays import Array, Arrays
from fmdeploy.runtime import Runtime
from fmdeploy.runtime.frame import Finding
from fmdeploy.runtime.guards.content import Guards, InputGuard
from fmdeploy.runtime.guards.views import Views
from fmdeploy.runtime.measure.latency import golden_frames, measure_overhead
from support.bundles import make_bundle

TARGET_US, TARGET_P99_US = 30.0, 100.0
BLOCKS = 5
Step = Callable[[Arrays, list[Views], list[Array]], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--runs", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = options.bundle or make_bundle(Path(folder) / "bundle", size=64).root
        for tier in ("int8-cpu", "fp32"):
            report(Runtime(root, tiers=(tier,)), max(options.runs, 100))


def report(runtime: Runtime, runs: int) -> None:
    frames = golden_frames(runtime.bundle)
    blocks = [measure_overhead(runtime, frames, runs) for _ in range(BLOCKS)]
    best = min(blocks, key=lambda block: block["overhead_us"])
    size = sum(array.nbytes for array in frames[0].values())
    print(f"\n{runtime.tier}: {size / 1000:.0f} kB a frame, {BLOCKS} blocks of {runs} rounds, 1 thread")
    print(f"  bare session.run      {best['bare_us']:8.1f} µs")
    print(f"  Runtime.infer         {best['infer_us']:8.1f} µs   ratio {best['ratio']:.3f}")
    line("overhead", blocks, "overhead_us", TARGET_US)
    line("overhead p99", blocks, "overhead_p99_us", TARGET_P99_US)
    line("control bare - bare", blocks, "control_us")
    line("control p99", blocks, "control_p99_us")
    cold = [measure_overhead(runtime, frames, runs, fresh=False) for _ in range(BLOCKS)]
    line("overhead, cold frames", cold, "overhead_us")
    print("  each guard, µs                median     p99")
    for name, times in guard_costs(runtime, frames, BLOCKS * runs).items():
        print(f"    {name:26}{np.median(times):8.1f}{np.percentile(times, 99):8.1f}")


def line(name: str, blocks: list[dict[str, float]], key: str, target: float | None = None) -> None:
    """The median of the blocks, and each block: a block in which something else ran shows."""
    values = sorted(block[key] for block in blocks)
    each = ", ".join(f"{value:.1f}" for value in values)
    print(f"  {name:22}{np.median(values):8.1f} µs   blocks {each}" + (f"   (target {target:g})" if target else ""))


def guard_costs(runtime: Runtime, frames: list[Arrays], runs: int) -> dict[str, Array]:
    """µs (runs) of every guard, in the order of `infer`."""
    steps = guard_steps(runtime.inference.guards)
    rows = np.empty((runs, len(steps)))
    slot = {name: array.copy() for name, array in frames[0].items()}
    feeds = {name: array[None] for name, array in slot.items()}
    views = [guard.views(slot[guard.name]) for guard in runtime.inference.guards.inputs]
    results: list[Array] = list(runtime.backend.run(feeds))
    for number in range(runs):
        for name, array in frames[number % len(frames)].items():
            np.copyto(slot[name], array)
        for at, (name, step) in enumerate(steps.items()):
            if name == "outputs":
                results = list(runtime.backend.run(feeds))
            start = time.perf_counter_ns()
            step(slot, views, results)
            rows[number, at] = (time.perf_counter_ns() - start) / 1e3
    return dict(zip(steps, rows.T, strict=True))


def guard_steps(guards: Guards) -> dict[str, Step]:
    """One step a guard."""
    found: list[Finding] = []
    names = list(guards.output_names)
    steps: dict[str, Step] = {"structure": lambda slot, views, results: guards.structure(slot, None)}
    steps["views"] = lambda slot, views, results: [guard.views(slot[guard.name]) for guard in guards.inputs]
    for at, guard in enumerate(guards.inputs):
        steps[f"{guard.name}: NaN and range"] = value_step(guard, at)
    for at, guard in enumerate(guards.inputs):
        steps[f"{guard.name}: frozen, torn, const"] = stream_step(guard, at, found)
    if guards.unusual is not None:
        unusual = guards.unusual
        steps["statistics"] = lambda slot, views, results: unusual.check(views, found)
    steps["outputs"] = lambda slot, views, results: guards.outputs(dict(zip(names, results, strict=True)))
    return steps


def value_step(guard: InputGuard, at: int) -> Step:
    return lambda slot, views, results: guard.values.check(views[at])


def stream_step(guard: InputGuard, at: int, found: list[Finding]) -> Step:
    return lambda slot, views, results: guard.stream.check(views[at], found)


if __name__ == "__main__":
    main()

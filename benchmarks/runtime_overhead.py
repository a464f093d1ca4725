"""What `Runtime.infer` costs over the bare session, with all guards on, and what each guard costs.

    python benchmarks/runtime_overhead.py [--bundle DIR] [--runs N]

Rounds of bare, infer, bare in one process, in all orders in turn; `control` is bare against bare (A/A). Without
`--bundle` it uses a small convolutional model with the demo task's inputs: lidar (8, 64, 64) and camera (12, 64, 64),
328 kB of float32.
Every frame was just written by this core, as preprocessing leaves it; the line "cold" is for frames that lie in memory
and are read first by the guards. Target: overhead at most 50 µs at the median. Guard lines are measured right after a
model run, that is with the caches as a run leaves them.
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

from fmdeploy.arrays import Arrays
from fmdeploy.runtime import Runtime
from fmdeploy.runtime.measure.latency import golden_frames, measure_overhead
from support.bundles import make_bundle

TARGET_US = 50.0
BLOCKS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--runs", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = options.bundle or make_bundle(Path(folder) / "bundle", size=64).root
        for tier in ("int8-cpu", "fp32"):
            report(Runtime(root, tiers=(tier,)), max(options.runs, 30))


def report(runtime: Runtime, runs: int) -> None:
    frames = golden_frames(runtime.bundle)
    blocks = [measure_overhead(runtime, frames, runs) for _ in range(BLOCKS)]
    best = min(blocks, key=lambda block: block["overhead_us"])
    overheads = sorted(block["overhead_us"] for block in blocks)
    size = sum(array.nbytes for array in frames[0].values())
    print(f"\n{runtime.tier}: {size / 1000:.0f} kB a frame, {BLOCKS} blocks of {runs} rounds, 1 thread")
    print(f"  bare session.run      {best['bare_us']:8.1f} µs")
    print(f"  Runtime.infer         {best['infer_us']:8.1f} µs   ratio {best['ratio']:.3f}")
    each = ", ".join(f"{overhead:.1f}" for overhead in overheads)
    print(f"  overhead              {np.median(overheads):8.1f} µs   blocks {each}   (target {TARGET_US:g})")
    cold = np.median([measure_overhead(runtime, frames, runs, fresh=False)["overhead_us"] for _ in range(BLOCKS)])
    print(f"  overhead, cold frames {cold:8.1f} µs")
    control = best["control_us"]
    print(f"  control bare - bare   {control:8.1f} µs   ratio {1 + control / best['bare_us']:.3f}")
    for name, cost in guard_costs(runtime, frames, runs).items():
        print(f"    {name:30}{cost:8.1f} µs")


def guard_costs(runtime: Runtime, frames: list[Arrays], runs: int) -> dict[str, float]:
    """Median µs of every step of `infer` but the model, in order, each after a model run."""
    guards, run = runtime.inference.guards, runtime.backend.run
    values = guards.own(frames[0])
    feeds = guards.feeds(values)
    results = dict(zip((spec.name for spec in runtime.bundle.io.outputs), run(feeds), strict=True))
    steps: dict[str, Callable[[Arrays], object]] = {
        "structure": lambda frame: guards.structure(frame, None),
        "own": guards.own,
        "NaN and range": lambda frame: guards.fatal(list(frame.values())),
        "constant, frozen, statistics": lambda frame: guards.doubts(list(frame.values())),
        "outputs finite": lambda _: guards.outputs(results),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(runs):
        run(feeds)
        for name, step in steps.items():
            start = time.perf_counter_ns()
            step(frames[number % len(frames)])
            times[name].append((time.perf_counter_ns() - start) / 1e3)
    return {name: float(np.median(values)) for name, values in times.items()}


if __name__ == "__main__":
    main()

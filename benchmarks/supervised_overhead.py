"""What a worker process costs: `SupervisedRuntime.infer` over `Runtime.infer` on the same frames.

    python benchmarks/supervised_overhead.py [--bundle DIR] [--runs N]

Rounds of embedded, supervised, embedded in all orders in turn, each on a frame that was just written; `control` is
embedded against embedded (A/A). Target: at most 150 µs more at the median on the demo task's frames (328 kB in, 82 kB
out). The lines below it time the steps in which the difference is made: the copy into the ring, the copy out of it, and
one packet there and back between two processes, which is what waking a sleeping process costs on this machine.
Also: memory of the parent and of each worker, and what a SIGKILL costs until the next valid frame.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fmdeploy.arrays import Arrays
from fmdeploy.iospec import IOSpec
from fmdeploy.runtime import Runtime
from fmdeploy.runtime.measure.latency import golden_frames
from fmdeploy.runtime.state import Policy
from fmdeploy.runtime.supervisor.ring import Ring
from fmdeploy.runtime.supervisor.supervised import SupervisedRuntime
from fmdeploy.runtime.supervisor.watch import rss_mib
from support.bundles import make_bundle

TARGET_US = 150.0
BLOCKS = 5
PERIOD_S = 0.2  # of the demo task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--tiers", default="int8-cpu,fp32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = options.bundle or make_bundle(Path(folder) / "bundle", size=64).root
        tiers = tuple(options.tiers.split(","))
        with Runtime(root, tiers=tiers) as embedded, SupervisedRuntime(root, tiers=tiers, standby=False) as supervised:
            frames = golden_frames(embedded.bundle)
            report(embedded, supervised, frames, max(options.runs, 30))
        for standby in (False, True):
            with SupervisedRuntime(root, tiers=tiers, standby=standby, policy=Policy(max_restarts=100)) as runtime:
                losses(runtime, frames, standby)


def report(embedded: Runtime, supervised: SupervisedRuntime, frames: list[Arrays], runs: int) -> None:
    blocks = [measure(embedded, supervised, frames, runs) for _ in range(BLOCKS)]
    rows = np.concatenate(blocks)
    over = [float(np.median(block[:, 1] - (block[:, 0] + block[:, 2]) / 2)) for block in blocks]
    one, other, again = np.median(rows, axis=0)
    size = sum(array.nbytes for array in frames[0].values())
    print(f"\n{embedded.tier}: {size / 1000:.0f} kB a frame, {BLOCKS} blocks of {runs} rounds")
    print(f"  Runtime.infer            {(one + again) / 2:8.1f} µs")
    print(f"  SupervisedRuntime.infer  {other:8.1f} µs   ratio {2 * other / (one + again):.3f}")
    print(f"  difference               {np.median(over):8.1f} µs   blocks {', '.join(f'{o:.1f}' for o in over)}"
          f"   (target {TARGET_US:g})")
    print(f"  control (A/A)            {np.median(rows[:, 2] - rows[:, 0]):8.1f} µs   ratio {again / one:.3f}")
    for name, microseconds in steps(embedded.bundle.io, frames[0], runs).items():
        print(f"    {name:38}{microseconds:8.1f} µs")


def measure(
    embedded: Runtime, supervised: SupervisedRuntime, frames: list[Arrays], runs: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Microseconds of embedded, supervised, embedded (runs, 3)."""
    sides: tuple[Callable[[Arrays], object], ...] = (embedded.infer, supervised.infer, embedded.infer)
    orders, slot = list(itertools.permutations(range(3))), {name: array.copy() for name, array in frames[0].items()}
    rows = np.empty((runs, 3))
    for number in range(-20, runs):
        for side in orders[number % len(orders)]:
            for name, array in frames[number % len(frames)].items():
                np.copyto(slot[name], array)
            start = time.perf_counter_ns()
            sides[side](slot)
            if number >= 0:
                rows[number, side] = (time.perf_counter_ns() - start) / 1e3
    return rows


def steps(io: IOSpec, frame: Arrays, runs: int) -> dict[str, float]:
    """Median microseconds of the parts of the difference."""
    ring = Ring(bytearray(Ring.size_of(io.inputs, 1)), io.inputs, 1)
    results = Ring(bytearray(Ring.size_of(io.outputs, 1)), io.outputs, 1)
    outputs = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in io.outputs}
    results.write(0, 0, outputs)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if (child := os.fork()) == 0:
        while packet := theirs.recv(64):
            theirs.send(packet)
            if packet == b"stop":
                os._exit(0)

    def ping() -> None:
        ours.send(b"ping")
        ours.recv(64)

    numbers = iter(range(10**9))
    parts: dict[str, Callable[[], object]] = {
        "inputs into the ring": lambda: ring.write(next(numbers), 0, frame),
        "outputs into the ring": lambda: results.write(0, 0, outputs),
        "outputs out of the ring": lambda: results.read(0),
        "a packet to a process and back": ping,
    }
    found = {name: _median_us(part, runs) for name, part in parts.items()}
    ours.send(b"stop")
    os.waitpid(child, 0)
    return found


def _median_us(call: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return float(np.median(times))


def losses(runtime: SupervisedRuntime, frames: list[Arrays], standby: bool) -> None:
    """Kill the serving worker between two frames at the demo's rate, five times."""
    wait_for_standby(runtime, standby)
    sizes = [f"{rss_mib(worker.pid) or 0:.0f}" for worker in runtime.fleet.workers()]
    waits, lost = [], []
    for _ in range(5):
        worker = runtime.fleet.serving()
        assert worker is not None
        os.kill(worker.pid, signal.SIGKILL)
        start, invalid = time.perf_counter(), 0
        while not runtime.infer(frames[invalid % len(frames)]).valid:
            invalid += 1
            time.sleep(PERIOD_S)
        waits.append(time.perf_counter() - start)
        lost.append(invalid)
        runtime.fleet.forget()
        time.sleep(2.0)
        wait_for_standby(runtime, standby)
    text = ", ".join(f"{1e3 * wait:.0f}" for wait in waits)
    print(f"\n{'with' if standby else 'without'} a standby: parent {rss_mib(os.getpid()) or 0:.0f} MiB, workers "
          f"{' + '.join(sizes)} MiB RSS\n  first valid frame after a SIGKILL: {text} ms, frames lost {lost}")


def wait_for_standby(runtime: SupervisedRuntime, standby: bool) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if sum(worker.ready is not None for worker in runtime.fleet.workers()) >= 1 + standby:
            return
        time.sleep(0.02)


if __name__ == "__main__":
    main()

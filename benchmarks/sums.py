"""Seconds of a sum over two processes of one machine: gloo against shared memory, in turn, in the same processes.

    OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/sums.py

128 numbers are the statistics of a BatchNorm, 2,150,000 the gradients of the demo's teacher. `control` is gloo again
(A/A). Prints the median and the 90th percentile of each, and the CPU time that a sum costs this process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fmdeploy.training.distributed import add_up, shares_memory

ROUNDS = 5
SIZES = {128: 200, 2_150_000: 20}  # numbers, sums a round


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if not shares_memory(torch.nn.Identity()):
        raise SystemExit("these processes do not share memory: there is nothing to compare")
    ways: dict[str, Callable[[Tensor], object]] = {"gloo": dist.all_reduce, "shared memory": add_up,
                                                   "control": dist.all_reduce}
    for size, repeats in SIZES.items():
        spans: dict[str, list[float]] = {name: [] for name in ways}
        cpu = dict.fromkeys(ways, 0.0)
        for _ in range(ROUNDS):
            for name, way in ways.items():
                cpu[name] += measure(way, torch.zeros(size), repeats, spans[name]) / ROUNDS / repeats
        if dist.get_rank() == 0:
            for name, found in spans.items():
                print(f"{size} numbers, {name}: median {statistics.median(found) * 1e6:.0f} us, "
                      f"p90 {statistics.quantiles(found, n=10)[-1] * 1e6:.0f} us, CPU {cpu[name] * 1e6:.0f} us",
                      flush=True)
    dist.destroy_process_group()


def measure(way: Callable[[Tensor], object], x: Tensor, repeats: int, spans: list[float]) -> float:
    """Append the seconds of each sum to `spans`; the CPU seconds of all of them."""
    way(x)
    dist.barrier()
    before = time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        way(x)
        spans.append(time.perf_counter() - start)
    return time.process_time() - before


if __name__ == "__main__":
    main()

"""Writing a feature cache against writing the same bytes.

    python benchmarks/cache_write.py [--shards N] [--rounds N] [--encoding float16|int8] [--folder DIR]

The cache's arm does all that `fmdeploy cache` does with the teacher's answers (float32 maps (384, 16, 16), 512 a shard,
64 a batch): check, encode, gather a shard, measure its round trip, write, fsync, rename. The raw arm writes a buffer of
the same size and fsyncs. Both take turns in one process, on the same file system; the raw arm twice (the A/A control).
Wall clock, since a disk is what is measured, medians. Target: cache ≥ 0.7 × raw.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmdeploy.arrays import Array, Arrays
from fmdeploy.draft import Draft
from fmdeploy.teacher.caching.index import Address, shard_name
from fmdeploy.teacher.caching.reuse import Shelf
from fmdeploy.teacher.caching.writing import CacheWriter

SHAPE = (384, 16, 16)
PER_SHARD, BATCH = 512, 64


class Answered(CacheWriter):
    """A writer whose teacher has answered already: nothing but the writing is left to measure."""

    ready: list[Arrays]

    def _forward(self, samples: Any, index: Array) -> Iterator[Arrays]:
        return iter(self.ready[: -(-len(index) // BATCH)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4, help="written one after the other and timed together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--encoding", choices=["float16", "int8"], action="append")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; none given: the system's for scratch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for encoding in options.encoding or ("float16", "int8"):
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            measure(Path(name), encoding, options.shards, options.rounds)


def _writer(home: Path, encoding: str, shards: int) -> Answered:
    address = Address(teacher="", data="", split="train", samples="", preprocessing="", layers=(), encoding=encoding,
                      logits={}, precision="fp32", batch=BATCH, per_shard=PER_SHARD)
    samples: Any = range(PER_SHARD * shards)
    writer = Answered(Draft(home), address, samples, lambda: samples, view=_nobody, shelf=Shelf())
    rng = np.random.default_rng(0)
    writer.ready = [{"feature.tokens": rng.standard_normal((BATCH, *SHAPE), np.float32)}
                    for _ in range(PER_SHARD // BATCH)]
    return writer


def _nobody() -> Any:
    raise AssertionError("no teacher is needed")


def measure(home: Path, encoding: str, shards: int, rounds: int) -> None:
    writer = _writer(home, encoding, shards)
    paths = [home / shard_name(writer.address.key, number) for number in range(shards)]
    _cache(writer, paths)
    content = paths[0].read_bytes()
    calls: dict[str, Callable[[], None]] = {
        "cache": lambda: _cache(writer, paths), "raw": lambda: _raw(home, content, shards),
        "raw again": lambda: _raw(home, content, shards),
    }
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, call in calls.items():
            os.sync()
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    report(encoding, len(content) * shards, {name: float(np.median(row)) for name, row in times.items()})


def _cache(writer: Answered, paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
    writer.write(range(len(paths)))


def _raw(home: Path, content: bytes, count: int) -> None:
    for number in range(count):
        path = home / f"{number}.raw"
        path.unlink(missing_ok=True)
        with path.open("wb", buffering=0) as stream:
            stream.write(content)
            os.fsync(stream.fileno())


def report(encoding: str, size: int, seconds: dict[str, float]) -> None:
    print(f"{encoding}, {size / 1e6:.0f} MB a round, fsync on both sides")
    for name, value in seconds.items():
        print(f"  {name:10} {size / 1e6 / value:8.0f} MB/s")
    print(f"  control (A/A)   {seconds['raw'] / seconds['raw again']:6.2f}")
    print(f"  cache / raw     {seconds['raw'] / seconds['cache']:6.2f} (target ≥ 0.7)")


if __name__ == "__main__":
    main()

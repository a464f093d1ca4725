"""Peak memory of `teacher train` and `cache` from 1,000 to 100,000 samples.

    python benchmarks/flat_memory.py [--samples 1000,10000,100000] [--steps 30] [--stages train,cache] [--keep DIR]

Each size is a DATASET in the real format, written by `DatasetWriter` from a few distinct drives that repeat; only its
train split grows. A tiny teacher is trained on it for a few steps, and its features are cached with a small tensor a
sample. Each command is a process of its own. Printed: `peak`, the largest resident set (`ru_maxrss`, which is VmHWM),
and `anonymous`, the largest RssAnon that was seen (sampled every 20 ms; no files that are mapped or shared libraries).
Target: the largest set takes at most 1.25 x the memory of the smallest.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fmdeploy.config import StageConfig
from fmdeploy.data.writer import DatasetWriter
from fmdeploy.draft import Draft, produce
from fmdeploy.manifest import Kind
from fmdeploy.tasks.bev_occupancy_samples import HORIZONS, PAST, SCENES, STRIDE
from support import training_data

FRAMES = 40  # of one sequence, as recorded ones have
PER_SEQUENCE = len(range(PAST - 1, FRAMES - HORIZONS[-1], STRIDE))
DISTINCT = 8
HELD_OUT = 2  # sequences of val and of test
TARGET = 1.25
SIZES = ["--dim", "16", "--depth", "1", "--heads", "2", "--stem-width", "8", "--width", "16"]
MIB = 2**20


class Generated(StageConfig):
    """How large a generated set is."""

    samples: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", default="1000,10000,100000")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--stages", default="train,cache", help="cache needs the teacher of train")
    parser.add_argument("--keep", type=Path, help="folder for the data; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = [measured(int(count), options, options.keep or Path(temporary)) for count in options.samples.split(",")]
    for stage in rows[0]:
        first, last = rows[0][stage], rows[-1][stage]
        ratio = last[0] / first[0]
        print(f"{stage}: {ratio:.3f} x the peak of the smallest set, {'ok' if ratio <= TARGET else 'TOO MUCH'} "
              f"(target {TARGET:g}); anonymous {last[1] / first[1]:.3f} x")


def measured(count: int, options: argparse.Namespace, folder: Path) -> dict[str, tuple[float, float]]:
    """Peak and anonymous memory of the stages, in MiB."""
    data, teacher = folder / f"data-{count}", folder / f"teacher-{count}"
    started = time.perf_counter()
    if not data.exists():
        generate(data, count)
    size = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    print(f"{count:7,} samples, {size / MIB:.0f} MiB on disk ({time.perf_counter() - started:.0f} s)", flush=True)
    commands: dict[str, list[object]] = {
        "train": ["teacher", "train", "--data", data, "--out", teacher, "--steps", options.steps, "--batch", 16,
                  "--precision", "fp32", *SIZES],
        "cache": ["cache", "--teacher", teacher, "--data", data, "--out", folder / f"features-{count}", "--precision",
                  "fp32"],
    }
    found = {stage: watch(*commands[stage]) for stage in options.stages.split(",")}
    for stage, (peak, anonymous, seconds) in found.items():
        print(f"    {stage:5}  peak {peak:6.0f} MiB   anonymous {anonymous:6.0f} MiB   {seconds:5.1f} s", flush=True)
    return {stage: row[:2] for stage, row in found.items()}


def generate(out: Path, count: int) -> None:
    """A DATASET with `count` training samples."""
    drives = [_drive(number) for number in range(DISTINCT)]
    train = -(-count // PER_SEQUENCE)

    def build(draft: Draft) -> None:
        writer, names = DatasetWriter(draft), [f"s{number:06d}" for number in range(train + 2 * HELD_OUT)]
        for number, name in enumerate(names):
            writer.add(name, drives[number % DISTINCT], {
                "scenario": SCENES[number % len(SCENES)], "weather": "clear", "seed": number, "simulation": name,
                "recording": name, "place": "generated", "sensor_rig": "roof-1", "map_version": "none",
            })
        writer.close({"train": names[:train], "val": names[train : train + HELD_OUT], "test": names[-HELD_OUT:]})

    produce(out, Kind.DATASET, stage="generated", config=Generated(samples=count), inputs={}, build=build)


def _drive(number: int) -> dict[str, np.ndarray[Any, Any]]:
    short = training_data._sequence(np.random.default_rng(number))
    repeats = -(-FRAMES // training_data.FRAMES)
    return {name: np.concatenate([array] * repeats)[:FRAMES] for name, array in short.items()}


def watch(*arguments: object) -> tuple[float, float, float]:
    """Run one command; its largest resident set and RssAnon in MiB, and seconds."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "fmdeploy", *map(str, arguments)], stdout=subprocess.DEVNULL,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    status, anonymous = Path(f"/proc/{child.pid}/status"), 0
    while True:
        done, code, usage = os.wait4(child.pid, os.WNOHANG)
        if done:
            break
        with suppress(OSError):  # it may end between the two lines
            if match := re.search(r"RssAnon:\s+(\d+)", status.read_text()):
                anonymous = max(anonymous, int(match[1]))
        time.sleep(0.02)
    child.returncode = os.waitstatus_to_exitcode(code)
    if child.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} ended with {child.returncode}")
    return usage.ru_maxrss / 1024, anonymous / 1024, time.perf_counter() - started


if __name__ == "__main__":
    main()

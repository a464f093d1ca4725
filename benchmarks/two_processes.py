"""Throughput of training with two processes of one thread each against one process with one thread, at equal batches.

    python benchmarks/two_processes.py [--steps 30] [--rounds 3] [--batch 16] [--what teacher,student] [--profile]

Each run is a process group of its own (torchrun, gloo) that trains the demo's teacher or student on a few drives in
memory, with the loop that every stage uses. Rounds of one, two, one in turn; `control` is one against one (A/A). The
first steps of a run are left out. Target: at least 1.7 x on two idle cores; on a busy machine believe nothing.
`apart` is two processes with half a batch each that know nothing of each other: cores share caches, memory and clock,
so that two of them may give less than twice one, and nobody can beat that by sending gradients as well.
`--profile` prints where one of two processes spends the time of a step, and the CPU time that a step costs in all.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fmdeploy.data.format import open_dataset
from fmdeploy.task import load_task
from fmdeploy.training.batches import SupervisedBatches
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.loop import Batch, Job, Tensors, fit
from fmdeploy.training.mixture.options import Mixture
from support.training_data import write_scenes

TARGET = 1.7
WARM = 5  # steps that are not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--what", default="teacher,student")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--loose", action="store_true", help="do not bind each process to a core of its own")
    parser.add_argument("--core", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder) / "data", sequences=64)
        for what in options.what.split(","):
            compare(what, Path(folder), options)


def compare(what: str, folder: Path, options: argparse.Namespace) -> None:
    """Rounds of one, two and again one process."""
    found: dict[str, list[dict[str, float]]] = {"one": [], "two": [], "apart": [], "again": []}
    for number in range(options.rounds):
        for name in list(found) if number % 2 == 0 else list(found)[::-1]:
            found[name].append(apart(what, folder, options) if name == "apart" else
                               launch(what, 2 if name == "two" else 1, folder, options))
    step = {name: statistics.median(row["step_s"] for row in rows) for name, rows in found.items()}
    cpu = {name: statistics.median(row["cpu_s"] for row in rows) for name, rows in found.items()}
    ratio = step["one"] / step["two"]
    print(f"{what}: batch {options.batch}, one {step['one'] * 1e3:.1f} ms a step, two {step['two'] * 1e3:.1f} ms: "
          f"{ratio:.2f} x, {'ok' if ratio >= TARGET else 'TOO SLOW'} (target {TARGET:g}); "
          f"control {step['one'] / step['again']:.3f} x; CPU a step and process {cpu['one'] * 1e3:.1f} and "
          f"{cpu['two'] * 1e3:.1f} ms, so at most {cpu['one'] / cpu['two']:.2f} x; apart {step['apart'] * 1e3:.1f} ms: "
          f"{step['one'] / step['apart']:.2f} x, of which two have {step['apart'] / step['two']:.3f}", flush=True)


def apart(what: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Two runs of one process at the same time, each with half a batch; the slower one's numbers."""
    with ThreadPoolExecutor(2) as pool:
        half = options.batch // 2
        each = list(pool.map(lambda core: launch(what, 1, folder, options, core=core, batch=half), (0, 1)))
    return max(each, key=lambda row: row["step_s"])


def launch(
    what: str, processes: int, folder: Path, options: argparse.Namespace, *, core: int = 0, batch: int | None = None
) -> dict[str, float]:
    """One run; what its first process measured."""
    out = folder / f"{what}-{processes}-{core}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    if processes == 1:
        command = [sys.executable]
    subprocess.run(
        [*command, __file__, "--worker", what, str(folder), str(out), "--steps", str(options.steps), "--batch",
         str(batch or options.batch), "--core", str(core), *(["--profile"] if options.profile else []),
         *(["--loose"] if options.loose else [])],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=not options.profile, text=True)
    found: dict[str, float] = json.loads(out.read_text())
    return found


def work(options: argparse.Namespace) -> None:
    """Train in this process; the first one writes the median seconds and the CPU seconds of a step."""
    what, folder, out = options.worker
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not options.loose:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[options.core + int(os.environ.get("RANK", "0"))]})
    task = load_task("bev-occupancy")
    mixture = Mixture(task.samples(open_dataset(Path(folder) / "data"), "train"))
    model = task.teacher({}) if what == "teacher" else task.student("cnn", {})
    names = [spec.name for spec in task.io.inputs]
    outputs = [spec.name for spec in task.io.outputs]
    config = TrainingConfig(steps=options.steps + WARM, batch=options.batch, precision="fp32", mirror=False)
    ends: list[tuple[float, float]] = []

    def losses(wrapped: torch.nn.Module, batch: Tensors) -> dict[str, Tensor]:
        said = wrapped(*(batch["inputs"][name] for name in names))
        return {"hard": task.loss(dict(zip(outputs, said, strict=True)), batch["targets"])}

    def after_step(step: int) -> Mapping[str, Tensor]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        ends.append((time.perf_counter(), used.ru_utime + used.ru_stime))
        return {}

    made = SupervisedBatches(task, mixture, config)
    ready: list[Batch] = []  # the same batches in every run, made beforehand: the loader is measured elsewhere

    def batch(step: int, part: int) -> Batch:
        if not ready:
            ready.extend(made(number, 0) for number in range(config.steps))
        return ready[step]

    with tempfile.TemporaryDirectory() as work_folder:
        job = Job(what, model, batch, losses, Path(work_folder) / "work", Path(work_folder) / "log.jsonl")
        job = replace(job, after_step=after_step)
        if options.profile and int(os.environ.get("RANK", "0")) == 0:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                fit(job, config)
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=18))
        else:
            fit(job, config)
    kept = ends[WARM:]
    spans = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(kept)]
    if int(os.environ.get("RANK", "0")) == 0:
        Path(out).write_text(json.dumps({"step_s": statistics.median(s for s, _ in spans),
                                         "cpu_s": statistics.fmean(c for _, c in spans)}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

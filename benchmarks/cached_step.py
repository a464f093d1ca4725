"""What the teacher costs a training step: distillation from the cache against plain supervised training.

    python benchmarks/cached_step.py [--runs N] [--threads N] [--live] [--encoding float16|int8|...]

The same student, batch and optimiser in one process; supervised, supervised again (the A/A control) and cached
distillation take steps in turn, each with making its batch. In a real run batches are made in the background, so this
is the worst case. The teacher has its real size and random weights, which cost the same; `--live` also times the step
that runs it, the teacher's forward pass alone, and making the batch alone. Ratios come from the medians, and from the
minima, which a busy machine disturbs less. Targets: at most 1.1 times the supervised step; and live / cached, what
caching gains, at least 85 % of the ceiling (teacher + supervised) / supervised.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fmdeploy.artifact import open_artifact
from fmdeploy.distill.assemble import assemble
from fmdeploy.distill.config import DistillConfig
from fmdeploy.distill.sources import sources_of
from fmdeploy.models.saved import load_model
from fmdeploy.teacher.cache import cache
from fmdeploy.teacher.train import train
from fmdeploy.teacher.view import TeacherView
from fmdeploy.training.device import resolve_precision
from fmdeploy.training.loop import Run, to_tensors
from support.training_data import write_scenes

TARGET = 1.1
SHARE_OF_CEILING = 0.85
WARM_UP = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--live", action="store_true", help="also time the step with a live teacher")
    parser.add_argument("--encoding", default="float16", help="of the features; outputs float16, or int8 beside int8")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        write_scenes(home / "data", sequences=128)
        train(data=home / "data", out=home / "teacher", steps=1)
        logits = "int8" if options.encoding == "int8" else "float16"
        cache(teacher=home / "teacher", data=home / "data", out=home / "features", encoding=options.encoding,
              logits=(logits,))
        calls = steps(arms(home, live=options.live), home, live=options.live)
        report(measure(calls, max(options.runs, 30)), options.threads)


def arms(home: Path, *, live: bool) -> dict[str, Run]:
    """Ready training runs by name; every one starts from the same weights."""
    teacher = {"teacher": home / "teacher"}
    wanted: dict[str, dict[str, Path]] = {"supervised": {}, "supervised again": {}}
    wanted["cached"] = teacher | {"features": home / "features"}
    if live:
        wanted["live"] = teacher
    return {name: _run(home, name, inputs) for name, inputs in wanted.items()}


def _run(home: Path, name: str, inputs: dict[str, Path]) -> Run:
    config = DistillConfig(data=home / "data", out=home / name, labels=0.5, precision=resolve_precision("auto"),
                           teacher=tuple(filter(None, [inputs.get("teacher")])),
                           features=tuple(filter(None, [inputs.get("features")])))
    job = assemble(config, sources_of(config), folder=home / f"{name}-work", log=home / f"{name}.jsonl").job
    run = Run(job, config)
    run.model.train()
    return run


def steps(runs: dict[str, Run], home: Path, *, live: bool) -> dict[str, Callable[[int], object]]:
    """What is timed, called with the number of the step."""
    calls: dict[str, Callable[[int], object]] = {name: partial(_step, run) for name, run in runs.items()}
    if live:
        inputs = to_tensors(runs["live"].job.batch(0, 0), runs["live"].accelerator.device)["inputs"]
        view = _view(home)
        calls["teacher alone"] = lambda step: view.tensors(inputs)
        calls["cached batch"] = lambda step: runs["cached"].job.batch(step, 0)
        calls["supervised batch"] = lambda step: runs["supervised"].job.batch(step, 0)
    return calls


def _step(run: Run, step: int) -> None:
    run.step(step, partial(run.job.batch, step, 0))


def _view(home: Path) -> TeacherView:
    loaded = load_model(open_artifact(home / "teacher"))
    return TeacherView(loaded.module, loaded.task.io, (loaded.task.teacher_layer,), resolve_precision("auto"))


def measure(calls: dict[str, Callable[[int], object]], count: int) -> dict[str, np.ndarray[Any, Any]]:
    """Seconds of each call (count,), the arms taking turns."""
    found: dict[str, list[float]] = defaultdict(list)
    for step in range(count + WARM_UP):
        for name, call in calls.items():
            started = time.perf_counter()
            call(step)
            found[name].append(time.perf_counter() - started)
    return {name: np.asarray(row[WARM_UP:]) for name, row in found.items()}


def report(times: dict[str, np.ndarray[Any, Any]], threads: int) -> None:
    count = len(times["supervised"])
    print(f"{threads} threads, {resolve_precision('auto')}, batch 16, {count} interleaved steps")
    for name, row in times.items():
        print(f"  {name:18} median {np.median(row) * 1e3:7.2f} ms   min {row.min() * 1e3:7.2f} ms")
    base = times["supervised"]
    for title, name, target in (("control (A/A)", "supervised again", ""),
                                ("cached / supervised", "cached", f"   (target <= {TARGET})"),
                                ("live / supervised", "live", "")):
        if name in times:
            paired = np.median(times[name] / base)
            print(f"  {title:22} {np.median(times[name]) / np.median(base):6.3f} of medians   "
                  f"{times[name].min() / base.min():6.3f} of minima   {paired:6.3f} paired{target}")
    if "live" in times:
        for title, of in (("medians", np.median), ("minima", np.min)):
            gain = of(times["live"]) / of(times["cached"])
            ceiling = (of(times["teacher alone"]) + of(base)) / of(base)
            print(f"  of {title}: live / cached {gain:.3f}, ceiling {ceiling:.3f}, share {gain / ceiling:.3f} "
                  f"(target >= {SHARE_OF_CEILING})")


if __name__ == "__main__":
    main()

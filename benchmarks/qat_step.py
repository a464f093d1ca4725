"""What the grid costs a training step: QAT and QAD against the same step in FP32.

    python benchmarks/qat_step.py [--runs N] [--threads N] [--student NAME]

One process, the arms take turns, each step with making its batch. Both sides have the same student, batch, optimiser
and objective: labels for QAT (`supervised`), the cached teacher for QAD (`distilled`). FP32 twice is the A/A control.
QAT that imitates the float student, the default, runs that network too: its row says what that adds, and is no target.
Target: at most 1.2 times the FP32 step. The FP32 student has its BatchNorms, the quantised one has them folded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cached_step import measure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fmdeploy.artifact import open_artifact
from fmdeploy.data.format import open_dataset
from fmdeploy.distill.assemble import assemble
from fmdeploy.distill.config import DistillConfig
from fmdeploy.distill.distill import distill
from fmdeploy.distill.sources import sources_of
from fmdeploy.models.saved import load_model
from fmdeploy.quantize.calibrate import draw
from fmdeploy.quantize.learned import training_quantizers
from fmdeploy.quantize.ptq import ptq
from fmdeploy.quantize.qad import school
from fmdeploy.quantize.qat import Lesson, imitation
from fmdeploy.teacher.cache import cache
from fmdeploy.teacher.train import train
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.loop import Job, Run
from support.training_data import write_scenes

TARGET = 1.2
CONFIG = TrainingConfig.model_validate({"steps": 10**6, "batch": 16, "precision": "fp32", "channels_last": True})
BASES = {"QAT": "supervised", "QAT imitating": "supervised", "QAD": "distilled", "QAD learned ranges": "distilled",
         "supervised again": "supervised", "distilled again": "distilled"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--student", default="cnn")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        write_scenes(home / "data", sequences=128)
        train(data=home / "data", out=home / "teacher", steps=1)
        cache(teacher=home / "teacher", data=home / "data", out=home / "features")
        distill(data=home / "data", teacher=home / "teacher", features=home / "features", out=home / "student",
                steps=2, student=options.student, loss=("labels=0.5", "logits=2"))
        with ExitStack() as stack:
            runs = {name: stack.enter_context(arm) for name, arm in arms(home, options.student).items()}
            report(measure(runs, options.runs), options.threads, options.student)


def arms(home: Path, student: str) -> dict[str, Any]:
    """Name → a context that gives a ready training run."""
    found = {name: _float_run(home, name, student, taught="distilled" in name)
             for name in ("supervised", "supervised again", "distilled", "distilled again")}
    artifact, data = open_artifact(home / "student"), open_dataset(home / "data")
    loaded = load_model(artifact)
    calibration_set = draw(loaded.task, data, count=16, seed=0)
    for name in ("QAT", "QAT imitating", "QAD", "QAD learned ranges"):
        made = ptq(loaded.module, loaded.task.io, calibration_set)
        if name.startswith("QAD"):
            taught = school(artifact, CONFIG, data=home / "data", teacher=home / "teacher",
                            features=home / "features", task="bev-occupancy")
            lesson = taught.lesson(made)
        else:
            weights = (1.0, 0.0) if "imitating" in name else (0.0, 1.0)
            lesson = imitation(loaded.module, loaded.task, data, CONFIG, alpha_student=weights[0],
                               alpha_labels=weights[1])
        found[name] = _grid_run(home, name, made.module, lesson)
    return found


@contextmanager
def _float_run(home: Path, name: str, student: str, *, taught: bool) -> Iterator[Run]:
    teacher: dict[str, Any] = {"teacher": (home / "teacher",), "features": (home / "features",)} if taught else {}
    config = DistillConfig(data=home / "data", out=home / name, student=student, loss=("labels=0.5", "logits=2"),
                           **teacher, **CONFIG.model_dump())
    yield _ready(assemble(config, sources_of(config), folder=home / f"{name}-work", log=home / f"{name}.jsonl").job)


@contextmanager
def _grid_run(home: Path, name: str, module: torch.nn.Module, lesson: Lesson) -> Iterator[Run]:
    with training_quantizers(module, learn="learned" in name):
        yield _ready(Job(name, module, lesson.batch, lesson.losses, home / f"{name}-work", home / f"{name}.jsonl"))


def _ready(job: Job) -> Run:
    run = Run(job, CONFIG)
    run.model.train()
    return run


def report(times: dict[str, np.ndarray[Any, Any]], threads: int, student: str) -> None:
    print(f"{student}, {threads} threads, fp32, batch 16, {len(times['QAT'])} interleaved steps")
    for name, row in times.items():
        base = times.get(BASES.get(name, ""), row)
        note = f"(target <= {TARGET})" if name in ("QAT", "QAD", "QAD learned ranges") else ""
        note = "(A/A)" if "again" in name else note
        ratios = (f"{np.median(row) / np.median(base):6.3f} of medians  {row.min() / base.min():6.3f} of minima  "
                  f"{np.median(row / base):6.3f} paired  {note}") if base is not row else ""
        print(f"  {name:20} median {np.median(row) * 1e3:7.2f} ms  {ratios}")


if __name__ == "__main__":
    main()

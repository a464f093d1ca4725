"""`fmdeploy demo`: the whole pipeline on recorded driving scenes, one folder a stage, one summary.

The student learns from 10 % of the labels plus the teacher on all frames; beside it the same student is trained with
the same steps on those labels alone, which is what distillation has to beat.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.budgets import AccuracyBudget, Budgets, SensorLoss, TargetBudget
from fmdeploy.command import Outcome, command
from fmdeploy.config import OutputPath, StageConfig
from fmdeploy.errors import LeakageError
from fmdeploy.files import write_atomically
from fmdeploy.manifest import Kind
from fmdeploy.progress import say

LABELS = 0.1
# The student was not trained with dropout. Without the camera it loses 14 % of its IoU and may go on, marked; without
# the lidar it loses half, and is not perception any more: no mode is declared for that.
LOSS = {"camera": SensorLoss(fill="zeros", max_drop=0.25)}
FAST_LOSS = {"camera": SensorLoss(fill="zeros", max_drop=0.6)}  # 8 simulations: the interval reaches 0.36
TARGET = {"cpu": TargetBudget(p50_ms=10.0, p99_ms=50.0, peak_mib=400.0)}


@dataclass(frozen=True)
class Sizes:
    """Options of the stages, and the limits that the bundle must keep."""

    record: dict[str, Any]
    teacher: dict[str, Any]
    student: dict[str, Any]
    trouble: dict[str, Any]
    budgets: Budgets


FULL = Sizes(
    record={},
    teacher={"steps": 600},
    student={"steps": 500},
    trouble={"sequences": 32},
    budgets=Budgets(size_mib=2.0, target=TARGET, accuracy=AccuracyBudget(
        metric="iou", max_drop_vs_teacher=0.08, max_drop_vs_fp32=0.01, max_slice_drop=0.03), sensor_loss=LOSS),
)
# Toy networks after a hundred steps say nothing about distillation: only what INT8 loses is gated, and loosely.
FAST = Sizes(
    record={"simulations": 40},
    teacher={"steps": 100, "dim": 96, "depth": 2, "stem_width": 32, "width": 48},
    student={"steps": 100, "stem_width": 16, "width": 32},
    trouble={"sequences": 6},
    budgets=Budgets(size_mib=2.0, target=TARGET, accuracy=AccuracyBudget(
        metric="iou", max_drop_vs_fp32=0.1, min_samples=100), sensor_loss=FAST_LOSS),
)


class DemoConfig(StageConfig):
    """Where to, and how much of it."""

    out: OutputPath = Field(description="Folder for all artifacts, the report and summary.json")
    fast: bool = Field(False, description="Toy sizes: proves that everything runs, says little about accuracy")
    seed: int = Field(0, ge=0, description="Of the recording and of every training run")


class Clock:
    """Runs stages and keeps their wall-clock seconds; of a resumed stage, those of its last part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, stage: Callable[..., Any], **options: Any) -> Any:
        """Run `stage(**options)` and account for it under `name`."""
        say(f"── {name}")
        started = time.perf_counter()
        result = stage(**options)
        seconds = time.perf_counter() - started
        if isinstance(result, Artifact):  # a stage that was up to date took what it took when it ran
            seconds = max(seconds, result.manifest.environment["seconds"])
        self.seconds[name] = round(seconds, 2)
        return result


@command(DemoConfig)
def demo(config: DemoConfig) -> Outcome:
    """Record, train, cache, distil, quantise, export, check, cause trouble and report, into one folder.

    A second run with the same options goes on where the first one stopped.
    """
    from fmdeploy.summary import summarise, summary_lines

    clock = Clock()
    made = run_stages(config, clock)
    numbers = clock("summary", summarise, made=made)
    summary = {**numbers, "seconds": clock.seconds, "fast": config.fast, "seed": config.seed}
    write_atomically(config.out / "summary.json", json.dumps(summary, indent=1, sort_keys=True) + "\n")
    return Outcome(summary_lines(summary, config.out), summary, exit_code=0 if summary["passed"] else 1)


def run_stages(config: DemoConfig, clock: Clock) -> dict[str, Artifact]:
    """All stages in order; name of the folder → artifact."""
    out, sizes = config.out, FAST if config.fast else FULL
    made = {"data": record(config, clock, sizes.record)}
    made |= train(config, clock, sizes)
    from fmdeploy.export.export import export
    from fmdeploy.quantize.quantize import quantize
    from fmdeploy.runtime.check.check import check
    from fmdeploy.runtime.trouble.evaluate import evaluate

    made["quantized"] = clock("quantize", quantize, student=out / "student", data=out / "data", out=out / "quantized")
    write_atomically(out / "budgets.toml", sizes.budgets.to_toml())
    made["bundle"] = clock("export", export, model=out / "quantized", data=out / "data", out=out / "bundle",
                           budgets=out / "budgets.toml")
    clock("check", check, bundle=out / "bundle", data=out / "data", out=out / "check", again=True)
    made["check"] = open_artifact(out / "check", Kind.CHECK)
    clock("evaluate", evaluate, bundle=out / "bundle", data=out / "data", out=out / "trouble", **sizes.trouble)
    made["trouble"] = open_artifact(out / "trouble", Kind.EVALUATION)
    from fmdeploy.evaluate.report import report

    clock("report", report, artifacts=tuple(artifact.root for artifact in made.values()), out=out / "report.html",
          title="fmdeploy demo: bird's-eye-view occupancy")
    return made


def record(config: DemoConfig, clock: Clock, options: dict[str, Any]) -> Artifact:
    """The scenes, audited for leakage before anything is trained on them."""
    from fmdeploy.data.audit import audit
    from fmdeploy.data.record import record as record_stage

    artifact: Artifact = clock("record", record_stage, out=config.out / "data", seed=config.seed, **options)
    found: Outcome = clock("audit", audit, data=config.out / "data")
    if found.exit_code:
        raise LeakageError("the recording leaks between splits", where=config.out / "data", found=found.lines[0])
    return artifact


def train(config: DemoConfig, clock: Clock, sizes: Sizes) -> dict[str, Artifact]:
    """Teacher, its cache, the student that learns from it and the one that does not."""
    from fmdeploy.distill.distill import distill
    from fmdeploy.teacher.cache import cache
    from fmdeploy.teacher.train import train as train_teacher

    out, seed = config.out, config.seed
    common = {"data": out / "data", "labels": LABELS, "seed": seed, **sizes.student}
    return {
        "teacher": clock("teacher", train_teacher, data=out / "data", out=out / "teacher", seed=seed,
                         **sizes.teacher),
        "features": clock("cache", cache, teacher=out / "teacher", data=out / "data", out=out / "features"),
        "student": clock("distill", distill, teacher=out / "teacher", features=out / "features",
                         out=out / "student", **common),
        "student_scratch": clock("scratch", distill, out=out / "student_scratch", **common),
    }

"""What training on the grid brings back: a depthwise student under plain max PTQ, and after QAD.

    python benchmarks/qad_recovery.py --demo DIR [--steps N] [--train-steps N] [--all]

DIR is the output of `fmdeploy demo`: its dataset, teacher and features are used as they are. A depthwise student is
distilled from them, quantised by calibration alone with the largest magnitudes, and then trained on the grid with the
same cached teacher. Numbers are those of the test split; what stays and when training stops is chosen on the
validation split. `--all` adds the other ways to win accuracy back, for comparison: better calibration, imitation of the
float student (QAT), learned ranges. Targets: PTQ loses at least 2 %, and QAD brings at least two thirds of it back.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from fmdeploy.artifact import Artifact
from fmdeploy.distill.distill import distill
from fmdeploy.evaluate.bootstrap import drop
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.quantize.quantize import quantize
from fmdeploy.task import Metric, load_task

LR = 2e-2  # of the float student; see fmdeploy.models.depthwise
TARGET_LOSS, TARGET_SHARE = 0.02, 2 / 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300, help="of training on the grid")
    parser.add_argument("--train-steps", type=int, default=500, help="of the float student")
    parser.add_argument("--student", type=Path, help="a depthwise STUDENT made before")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    metric = load_task("bev-occupancy").metrics()[0]
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        student = options.student or _distil(options.demo, home / "student", options.train_steps)
        made = {}
        for arm, choice in arms(options.demo, options.steps, everything=options.all).items():
            started = time.perf_counter()
            out = home / arm.replace(" ", "-")
            made[arm] = quantize(student=student, data=options.demo / "data", out=out, **choice)
            print(f"  {arm:24} {time.perf_counter() - started:6.1f} s   {_numbers(made[arm], metric)}", flush=True)
        report(made, metric)


def _distil(demo: Path, out: Path, steps: int) -> Path:
    made = distill(data=demo / "data", teacher=demo / "teacher", features=demo / "features", out=out,
                   student="depthwise", labels=0.1, steps=steps, lr=LR)
    return made.root


def arms(demo: Path, steps: int, *, everything: bool) -> dict[str, dict[str, Any]]:
    """Name → options of `quantize`."""
    taught = {"mode": "qad", "teacher": demo / "teacher", "features": demo / "features", "steps": steps}
    found: dict[str, dict[str, Any]] = {"max PTQ": {}, "QAD": taught}
    if everything:
        found |= {
            "auto PTQ": {"calibrator": "auto"},
            "QAT": {"mode": "qat", "steps": steps},
            "QAD learned ranges": {**taught, "learn_scales": True},
        }
    return found


def _numbers(made: Artifact, metric: Metric) -> str:
    interval = _loss(made, metric)
    training = made.json("metrics.json").get("training", {})
    best = f", best at step {training['best_step']}" if training else ""
    return f"loses {interval.value:+.2%} [{interval.low:+.2%}, {interval.high:+.2%}]{best}"


def _loss(made: Artifact, metric: Metric) -> Any:
    return drop(Evaluation.load(made, "student_evaluation"), Evaluation.load(made, "evaluation"), metric)


def report(made: dict[str, Artifact], metric: Metric) -> None:
    before = Evaluation.load(made["max PTQ"], "student_evaluation").value(metric)
    lost, left = (_loss(made[arm], metric).value for arm in ("max PTQ", "QAD"))
    print(f"float {metric.name} {before:.4f}")
    print(f"  lost by max PTQ      {lost:.2%}   (target: at least {TARGET_LOSS:.0%})")
    share = f"{(lost - left) / lost:.2f}" if lost > 0 else "nothing was lost"
    print(f"  brought back by QAD  {share}   (target: at least {TARGET_SHARE:.2f})")


if __name__ == "__main__":
    main()
